"""Server-sent events: JSON values to an HTTP stream with one ``data`` line each. It does not know what they mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from aiohttp import web

from chunkwise.router.api.errors import describe_error

# A comment in the pauses keeps proxies from closing a stream that waits in the queue.
KEEPALIVE_S = 15.0


async def stream_events(
    request: web.Request,
    events: AsyncGenerator[Mapping[str, Any], None],
    headers: Mapping[str, str],
    *,
    keepalive_s: float = KEEPALIVE_S,
) -> web.StreamResponse:
    """Sends every event as it comes, in a response of status 200. An error ends the stream as its last event.

    ``events`` is closed when this returns or raises, also when the client goes away.
    """
    response = web.StreamResponse(
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers, "Content-Type": "text/event-stream"}
    )
    await response.prepare(request)
    following = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=keepalive_s)
            if not done:
                await response.write(b":\n\n")
                continue
            event = following.result()
            if event is None:
                break
            following = asyncio.ensure_future(anext(events, None))
            await _send(response, event)
    except ConnectionResetError:
        return response
    except Exception as error:
        await _send(response, describe_error(error)[1])
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await events.aclose()
    await response.write_eof()
    return response


async def _send(response: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await response.write(b"data:" + json.dumps(event).encode() + b"\n\n")

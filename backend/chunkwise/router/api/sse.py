"""Server-sent events: JSON values to an HTTP stream with one ``data`` line each. It does not know what they mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any

from aiohttp import web

from chunkwise.router.api.errors import describe_error

# A comment in the pauses keeps proxies from closing a stream that waits in the queue.
KEEPALIVE_S = 15.0


class _Stream:
    """One response that events and comments are written to."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response
        self._clock = asyncio.get_running_loop().time
        self._written_at = self._clock()

    async def send(self, event: Mapping[str, Any]) -> None:
        await self._write(b"data:" + json.dumps(event).encode() + b"\n\n")

    async def keep_alive(self, period_s: float) -> None:
        """Writes a comment whenever nothing has been written for ``period_s``, for ever."""
        with suppress(ConnectionResetError):
            while True:
                pause = self._clock() - self._written_at
                if pause >= period_s:
                    await self._write(b":\n\n")
                else:
                    await asyncio.sleep(period_s - pause)

    async def _write(self, data: bytes) -> None:
        self._written_at = self._clock()
        await self._response.write(data)


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
    stream = _Stream(response)
    keeping = asyncio.create_task(stream.keep_alive(keepalive_s))
    try:
        async for event in events:
            await stream.send(event)
    except ConnectionResetError:
        return response
    except Exception as error:
        await stream.send(describe_error(error)[1])
    finally:
        keeping.cancel()
        await events.aclose()
    await response.write_eof()
    return response

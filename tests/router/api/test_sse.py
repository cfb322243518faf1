from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from chunkwise.core import GenerationFailed
from chunkwise.router.api.sse import stream_events

Events = AsyncGenerator[dict[str, Any], None]


@asynccontextmanager
async def streaming(events: Events) -> AsyncIterator[TestClient[Any, Any]]:
    """A client of a server whose only route streams ``events`` once."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream_events(request, events, {"x-extra": "1"}, keepalive_s=0.02)

    app = web.Application()
    app.router.add_get("/", handler)
    client: TestClient[Any, Any] = TestClient(TestServer(app))
    async with client:
        yield client


async def test_every_value_is_one_data_line() -> None:
    async def events() -> Events:
        yield {"text": "line\nbreak"}
        yield {"text": "é"}

    async with streaming(events()) as client:
        response = await client.get("/")
        assert response.headers["x-extra"] == "1"
        assert response.headers["Content-Type"] == "text/event-stream"
        assert (await response.read()).decode() == 'data:{"text": "line\\nbreak"}\n\ndata:{"text": "\\u00e9"}\n\n'


async def test_a_pause_is_filled_with_comments_and_loses_nothing() -> None:
    async def events() -> Events:
        yield {"n": 1}
        await asyncio.sleep(0.07)
        yield {"n": 2}

    async with streaming(events()) as client:
        body = await (await client.get("/")).read()
        assert body.startswith(b'data:{"n": 1}\n\n:\n\n')
        assert body.endswith(b':\n\ndata:{"n": 2}\n\n')


@pytest.mark.parametrize(
    ("error", "body"),
    [
        (GenerationFailed("boom"), b'{"error": "Request failed during generation: boom", "error_type": "generation"}'),
        (KeyError("x"), b'{"error": "internal error; the server\'s log has the cause", "error_type": "internal"}'),
    ],
)
async def test_an_error_is_the_last_event(error: Exception, body: bytes) -> None:
    async def events() -> Events:
        yield {"n": 1}
        raise error

    async with streaming(events()) as client:
        assert await (await client.get("/")).read() == b'data:{"n": 1}\n\ndata:' + body + b"\n\n"


async def test_the_source_is_closed_when_the_client_leaves() -> None:
    closed = asyncio.Event()

    async def events() -> Events:
        try:
            while True:
                yield {"n": 1}
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async with streaming(events()) as client:
        response = await client.get("/")
        await response.content.readline()
        response.close()
        await asyncio.wait_for(closed.wait(), 5)

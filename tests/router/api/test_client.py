"""The published `text-generation` client against the router, as its users run it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from chunkwise.config.settings import Limits
from chunkwise.core import GenerationFailed, GenerationRequest, SamplingParams, StoppingParams
from chunkwise.tokenizer import Tokenizer
from fakes import FakeShards, toy_text
from routing import http

# The client is written against pydantic 1's names.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]
text_generation = pytest.importorskip("text_generation")
errors = pytest.importorskip("text_generation.errors")


def url(client: TestClient[Any, Any]) -> str:
    return str(client.make_url("/")).rstrip("/")


def expected(model_dir: Path, prompt: str, length: int) -> str:
    ids = tuple(Tokenizer(model_dir).encode(prompt))
    return toy_text(GenerationRequest(0, prompt, SamplingParams(), StoppingParams(length), prompt_ids=ids), length)


def check_whole(response: Any, text: str) -> None:
    assert response.generated_text == text
    assert response.details.finish_reason == "length"
    assert response.details.generated_tokens == len(text)
    assert "".join(token.text for token in response.details.tokens) == text
    assert response.details.seed is None


def check_stream(events: list[Any], text: str) -> None:
    assert [event.token.text for event in events] == list(text)
    assert [event.generated_text for event in events] == [None] * (len(text) - 1) + [text]
    assert events[-1].details.generated_tokens == len(text)


async def test_the_sync_client_generates(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        sync = text_generation.Client(url(client))
        response = await asyncio.to_thread(sync.generate, "why?", max_new_tokens=7, top_n_tokens=2)
        check_whole(response, expected(model_dir, "why?", 7))
        assert [len(tops) for tops in response.details.top_tokens] == [2] * 7
        best = await asyncio.to_thread(sync.generate, "why?", max_new_tokens=3, do_sample=True, best_of=2)
        assert len(best.details.best_of_sequences) == 1


async def test_the_sync_client_streams(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        sync = text_generation.Client(url(client))
        events = await asyncio.to_thread(lambda: list(sync.generate_stream("why?", max_new_tokens=7)))
        check_stream(events, expected(model_dir, "why?", 7))


async def test_the_async_client_generates_and_streams(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        asynchronous = text_generation.AsyncClient(url(client))
        check_whole(await asynchronous.generate("why?", max_new_tokens=7), expected(model_dir, "why?", 7))
        events = [event async for event in asynchronous.generate_stream("why?", max_new_tokens=7)]
        check_stream(events, expected(model_dir, "why?", 7))


async def test_errors_arrive_as_the_clients_own(model_dir: Path) -> None:
    shards = FakeShards(failures={"prefill": [GenerationFailed("boom"), GenerationFailed("boom")]})
    async with http(shards, model_dir) as client:
        sync, asynchronous = text_generation.Client(url(client)), text_generation.AsyncClient(url(client))
        with pytest.raises(errors.GenerationError, match="boom"):
            await asyncio.to_thread(sync.generate, "why?")
        with pytest.raises(errors.GenerationError, match="boom"):
            await asyncio.to_thread(lambda: list(sync.generate_stream("why?")))
        with pytest.raises(errors.ValidationError, match="must have less than 101 tokens"):
            await asyncio.to_thread(sync.generate, "x" * 200)
        with pytest.raises(errors.ValidationError, match="must have less than 101 tokens"):
            await asynchronous.generate("x" * 200)
        with pytest.raises(errors.ValidationError, match="must have less than 101 tokens"):
            [event async for event in asynchronous.generate_stream("x" * 200)]


async def test_overload_and_a_missing_key_arrive_as_the_clients_own(model_dir: Path) -> None:
    shards = FakeShards()
    async with http(shards, model_dir, limits=Limits(max_concurrent_requests=1), api_key="k") as client:
        sync = text_generation.Client(url(client), headers={"Authorization": "Bearer k"})
        shards.running.clear()
        running = asyncio.create_task(asyncio.to_thread(sync.generate, "why?"))
        while not shards.named("prefill"):
            await asyncio.sleep(0.001)
        with pytest.raises(errors.OverloadedError, match="the limit is 1"):
            await asyncio.to_thread(sync.generate, "why?")
        shards.running.set()
        assert (await running).details.generated_tokens == 20
        with pytest.raises(errors.UnknownError, match="API key"):
            await asyncio.to_thread(text_generation.Client(url(client)).generate, "why?")

"""A router around fake shards, for the tests of its loop and of its HTTP doors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestClient, TestServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from chunkwise.config.policy import ChunkerPolicy, KvPolicy, RankPolicy, SteeringPolicy
from chunkwise.config.settings import Limits, RouterSettings
from chunkwise.core import GenerationRequest, SamplingParams, StoppingParams
from chunkwise.router.answer import Answer, Event
from chunkwise.router.api.app import build_app
from chunkwise.router.api.serving import Serving
from chunkwise.router.server import prepare
from fakes import FakeShards

# Short chunks, so that short answers see several.
POLICY = SteeringPolicy(
    chunker=ChunkerPolicy(min_length=2, max_length=4),
    rank=RankPolicy(source="complexity"),
    kv=KvPolicy(when="always", easy_below=0.5, hard_above=0.9, sink_tokens=2, recent_tokens=3, block_tokens=8),
)
BOS, EOS = "<s>", "</s>"


def write_tokenizer(directory: Path) -> Path:
    """A byte tokenizer with one special token in front of every prompt; returns the directory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {BOS: 0, EOS: 1, **{symbol: i + 2 for i, symbol in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def router_settings(model_dir: Path, **changes: Any) -> RouterSettings:
    """Settings for a router on a free local port."""
    values: dict[str, Any] = {"limits": Limits(max_batch_prefill_tokens=64), "policy": POLICY} | changes
    return RouterSettings("toy/model", model_dir, ("unix:///nowhere",), hostname="127.0.0.1", port=0, **values)


@asynccontextmanager
async def routing(shards: FakeShards, model_dir: Path, **changes: Any) -> AsyncIterator[Serving]:
    """A router whose loop runs."""
    serving = await prepare(router_settings(model_dir, **changes), shards)
    task = asyncio.create_task(serving.loop.run())
    try:
        yield serving
    finally:
        task.cancel()
        with suppress(Exception, asyncio.CancelledError):
            await task


@asynccontextmanager
async def http(shards: FakeShards, model_dir: Path, **changes: Any) -> AsyncIterator[TestClient[Any, Any]]:
    """A client of a router's HTTP door."""
    async with routing(shards, model_dir, **changes) as serving:
        client: TestClient[Any, Any] = TestClient(TestServer(build_app(serving)))
        async with client:
            yield client


def request(
    prompt_length: int = 5, new_tokens: int = 6, *, adapter: str | None = None, text: str = "p"
) -> GenerationRequest:
    """A request for the loop; its prompt differs with its length."""
    prompt = tuple((i * 7 + prompt_length) % 200 + 2 for i in range(prompt_length))
    return GenerationRequest(
        0, text, SamplingParams(), StoppingParams(new_tokens), prompt_ids=prompt, adapter_id=adapter
    )


async def events(answer: Answer) -> list[Event]:
    """All events of an answer."""
    return [event async for event in answer]


async def settled(shards: FakeShards, serving: Serving) -> None:
    """Waits until the router has nothing left to do, then checks that the shards hold nothing."""
    async with asyncio.timeout(5):
        while serving.loop.in_flight or shards.batches or shards.steered:
            await asyncio.sleep(0.001)
    shards.check_empty()

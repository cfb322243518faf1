from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from chunkwise.config.settings import Limits
from chunkwise.core import GenerationFailed, UnsupportedModel, WarmupLimits
from chunkwise.router import server
from chunkwise.router.server import prepare, serve_with
from chunkwise.router.shard_group import ShardLost
from fakes import FakeShards
from routing import POLICY, router_settings, write_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def served(
    shards: FakeShards, model_dir: Path, caplog: pytest.LogCaptureFixture, **changes: Any
) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """A router process's main task and the url that it logs when it is ready."""
    caplog.set_level(logging.INFO, "chunkwise.router")
    task = asyncio.create_task(serve_with(router_settings(model_dir, **changes), shards))
    try:
        while (ready := re.search(r"serving toy/model on (http://[\d.:]+)", caplog.text)) is None:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.001)
        yield ready[1], task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def ask(session: ClientSession, url: str, tokens: int) -> tuple[int, Any]:
    body = {"inputs": "hi", "parameters": {"max_new_tokens": tokens, "details": True}}
    async with session.post(f"{url}/generate", json=body) as response:
        return response.status, await response.json()


async def test_the_shards_are_brought_up_in_tgis_order(model_dir: Path) -> None:
    shards = FakeShards()
    await prepare(router_settings(model_dir), shards)
    assert [call.name for call in shards.calls] == ["info", "clear_cache", "warmup"]


async def test_sigterm_lets_running_requests_end(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = FakeShards()
    async with served(shards, model_dir, caplog) as (url, task), ClientSession() as session:
        shards.running.clear()
        running = asyncio.create_task(ask(session, url, 5))
        while not shards.named("prefill"):
            await asyncio.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)
        while "stopping: 1 requests" not in caplog.text:
            await asyncio.sleep(0.001)
        assert not task.done()
        shards.running.set()
        status, body = await running
        assert (status, body["details"]["generated_tokens"]) == (200, 5)
        await asyncio.wait_for(task, 5)


async def test_what_does_not_end_in_the_grace_time_is_told_so(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = FakeShards()
    async with served(shards, model_dir, caplog, grace_seconds=0.05) as (url, task), ClientSession() as session:
        shards.running.clear()
        running = asyncio.create_task(ask(session, url, 5))
        while not shards.named("prefill"):
            await asyncio.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        status, body = await running
        assert (status, body["error_type"]) == (503, "generation")
        assert "shutting down" in body["error"]
        await asyncio.wait_for(task, 5)


async def test_a_shard_that_is_lost_in_a_step_ends_the_process(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = FakeShards(failures={"decode": [ShardLost("shard 1 is gone")]})
    async with served(shards, model_dir, caplog) as (url, task), ClientSession() as session:
        status, body = await ask(session, url, 5)
        assert status == 503
        assert "shard 1 is gone" in body["error"]
        with pytest.raises(ShardLost, match="shard 1 is gone"):
            await asyncio.wait_for(task, 5)


async def test_a_shard_that_is_lost_while_idle_ends_the_process(
    model_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_WATCH_S", 0.01)
    shards = FakeShards()
    async with served(shards, model_dir, caplog) as (_, task):
        shards.health_error = GenerationFailed("slow")
        while "does not answer: slow" not in caplog.text:
            await asyncio.sleep(0.001)
        assert not task.done()
        shards.health_error = ShardLost("shard 0 is gone")
        with pytest.raises(ShardLost, match="shard 0 is gone"):
            await asyncio.wait_for(task, 5)


async def test_a_missing_tokenizer_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        await prepare(router_settings(tmp_path), FakeShards())


@pytest.mark.parametrize(
    ("limits", "granted", "message"),
    [
        (
            Limits(max_total_tokens=600),
            WarmupLimits(100, 600, 512),
            "max_total_tokens is 600 but the KV cache",
        ),
        (
            Limits(max_input_tokens=128),
            WarmupLimits(128, 128, 512),
            "max_input_tokens is 128; it must be",
        ),
        (Limits(), WarmupLimits(0, 1, 512), "max_input_tokens is 0"),
    ],
)
async def test_limits_that_cannot_be_kept_are_refused_at_start(
    model_dir: Path, limits: Limits, granted: WarmupLimits, message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        await prepare(router_settings(model_dir, limits=limits), FakeShards(limits=granted))


async def test_the_default_request_fits_a_cache_of_odd_size(model_dir: Path) -> None:
    """A cache of 127 tokens in pages of 4 holds 124: the longest request must be cut to that, or none would fit."""
    shards = FakeShards(limits=WarmupLimits(126, 127, 127))
    serving = await prepare(router_settings(model_dir, policy=POLICY), shards)
    assert serving.validator.agreed == WarmupLimits(123, 124, 124)


def test_the_router_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, chunkwise.router.server; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

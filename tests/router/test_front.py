"""The generate.v3 door, driven by a raw client: over fake shards, and over a real engine behind real sockets."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from chunkwise.config.flags import InvalidFlags, build_parser
from chunkwise.config.policy import KvPolicy, RankPolicy, SteeringPolicy
from chunkwise.config.resolve import front_settings
from chunkwise.config.settings import FrontSettings, LogSettings
from chunkwise.core import (
    ChunkDecision,
    GenerationFailed,
    GenerationRequest,
    RequestError,
    SteeringUpdate,
    UnsupportedModel,
)
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import generate_pb2_grpc as pb_grpc
from chunkwise.router import front as front_module
from chunkwise.router.front import Front, listening, prepare, serve
from chunkwise.router.shard_group import ShardLost
from chunkwise.shard.lane import Lane
from chunkwise.shard.server import build_server
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld
from fakes import FakeShards, toy_text
from routing import POLICY, write_tokenizer
from serving import Driver, request
from tgi_router import TgiRouter, batch, liveness_request, text_request, warmup_request

FULL = SteeringPolicy(rank=RankPolicy(source="complexity", min_rank=16), kv=KvPolicy(kind="full"))
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def front_of(
    shards: FakeShards, model_dir: Path, path: Path
) -> AsyncIterator[tuple[pb_grpc.TextGenerationServiceAsyncStub, Front]]:
    """A warmed-up front and a stub that talks to it."""
    url = f"unix://{path}/front-0"
    settings = FrontSettings("toy/model", model_dir, url, ("unix:///nowhere",), POLICY)
    front = await prepare(settings, shards)
    async with listening(front, url), grpc.aio.insecure_channel(f"unix:{path}/front-0") as channel:
        stub: pb_grpc.TextGenerationServiceAsyncStub = pb_grpc.TextGenerationServiceStub(channel)
        await stub.Warmup(warmup_request(64))
        shards.calls.clear()
        yield stub, front


def prefill(id: int, *requests: pb.Request, cached: pb.CachedBatch | None = None) -> pb.PrefillRequest:
    return pb.PrefillRequest(batch=batch(id, requests), cached_batch=cached)


async def test_it_looks_like_one_shard(model_dir: Path, tmp_path: Path) -> None:
    shards = FakeShards()
    async with front_of(shards, model_dir, tmp_path) as (stub, _):
        found = await stub.ServiceDiscovery(pb.ServiceDiscoveryRequest())
        assert list(found.urls) == [f"unix://{tmp_path}/front-0"]
        for id in (None, None, 12):
            await stub.ClearCache(pb.ClearCacheRequest(id=id))
        info = await stub.Info(pb.InfoRequest())
        assert info.block_size == 4
        assert not info.HasField("window_size")
        assert [adapter.adapter_id for adapter in info.adapters] == ["law", "med"]
        inferred = await stub.Warmup(warmup_request(64))
        assert (inferred.max_input_tokens, inferred.max_total_tokens) == (100, 128)
        echoed = await stub.Warmup(warmup_request(64, max_input_tokens=40, max_total_tokens=50))
        assert (echoed.max_input_tokens, echoed.max_total_tokens) == (40, 50)
        wrapped = await stub.Warmup(warmup_request(64, max_total_tokens=50))
        assert wrapped.max_total_tokens == 50


async def test_a_request_from_first_to_last_token(model_dir: Path, tmp_path: Path) -> None:
    shards = FakeShards()
    asked = text_request(0, "hello", new=3, adapter_id="law")
    async with front_of(shards, model_dir, tmp_path) as (stub, _):
        response: pb.PrefillResponse | pb.DecodeResponse = await stub.Prefill(prefill(0, asked))
        text = response.generations[0].tokens.texts[0]
        assert (response.batch.id, list(response.batch.request_ids), response.batch.size) == (0, [0], 1)
        while response.HasField("batch"):
            response = await stub.Decode(pb.DecodeRequest(batches=[response.batch]))
            text += response.generations[0].tokens.texts[0]
        ids = tuple(Tokenizer(model_dir).encode("hello"))
        assert text == response.generations[0].generated_text.text
        assert text == toy_text(replace(request(0, adapter_id="law"), prompt_ids=ids), 3)
        assert response.total_ns == 2_000_000
        # Whoever comes next carries the release along.
        await stub.ClearCache(pb.ClearCacheRequest())
    shards.check_empty()


async def test_statuses(model_dir: Path, tmp_path: Path) -> None:
    shards = FakeShards(errors={"bad": RequestError("not this one", "validation")})
    async with front_of(shards, model_dir, tmp_path) as (stub, front):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Decode(pb.DecodeRequest(batches=[pb.CachedBatch(id=77)]))
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "77" in (failed.value.details() or "")
        with pytest.raises(grpc.aio.AioRpcError, match="names no batch"):
            await stub.Decode(pb.DecodeRequest())
        with pytest.raises(grpc.aio.AioRpcError, match="not cached"):
            await stub.FilterBatch(pb.FilterBatchRequest(batch_id=3, request_ids=[1]))
        shards.failures["prefill"] = [GenerationFailed("no memory left")]
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await stub.Prefill(prefill(0, text_request(0, "hello")))
        assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.INTERNAL, "no memory left")
        await stub.ClearCache(pb.ClearCacheRequest(id=0))
        one = await stub.Prefill(prefill(1, text_request(1, "bad"), text_request(2, "good")))
        assert one.generations[0].error.message == "not this one"
        assert list(one.batch.request_ids) == [2]
        filtered = await stub.FilterBatch(pb.FilterBatchRequest(batch_id=1, request_ids=[2]))
        assert (filtered.batch.id, filtered.batch.size) == (1, 1)
        assert not front.broken.done()
        await stub.ClearCache(pb.ClearCacheRequest())
    shards.check_empty()


async def test_health_answers_and_the_liveness_probe_waits_while_a_step_runs(model_dir: Path, tmp_path: Path) -> None:
    shards = FakeShards()
    async with front_of(shards, model_dir, tmp_path) as (stub, _):
        running = await stub.Prefill(prefill(0, text_request(0, "hello", new=3, adapter_id="law")))
        shards.running.clear()
        decode = asyncio.ensure_future(stub.Decode(pb.DecodeRequest(batches=[running.batch])))
        while len(shards.named("decode")) < 1:
            await asyncio.sleep(0.001)
        probe = asyncio.ensure_future(stub.Prefill(liveness_request()))
        health = await asyncio.wait_for(stub.Health(pb.HealthRequest()), 1.0)
        assert health.shard_state.steered_requests == 1
        assert not decode.done()
        assert not probe.done()
        shards.running.set()
        assert list((await decode).batch.request_ids) == [0]
        assert not (await probe).HasField("batch")
        assert [call.name for call in shards.named("prefill", "decode")] == ["prefill", "decode", "prefill"]
        done = await stub.Decode(pb.DecodeRequest(batches=[running.batch]))
        assert done.generations[0].generated_text.generated_tokens == 3
        shards.health_error = GenerationFailed("out of order")
        with pytest.raises(grpc.aio.AioRpcError, match="out of order"):
            await stub.Health(pb.HealthRequest())


async def test_a_router_that_goes_away_in_a_step_leaves_no_half_step(model_dir: Path, tmp_path: Path) -> None:
    shards = FakeShards()
    async with front_of(shards, model_dir, tmp_path) as (stub, front):
        running = await stub.Prefill(prefill(0, text_request(0, "hello", new=9, adapter_id="law")))
        shards.running.clear()
        decode = stub.Decode(pb.DecodeRequest(batches=[running.batch]))
        while len(shards.named("decode")) < 1:
            await asyncio.sleep(0.001)
        decode.cancel()
        queued = stub.Decode(pb.DecodeRequest(batches=[running.batch]))
        with pytest.raises(asyncio.CancelledError):
            await decode
        shards.running.set()
        assert list((await queued).batch.request_ids) == [0]
        # The next router starts over.
        await stub.ClearCache(pb.ClearCacheRequest())
        assert (await stub.Prefill(prefill(0, text_request(0, "hello", new=1)))).generations
        assert not front.broken.done()
        await stub.ClearCache(pb.ClearCacheRequest())
    shards.check_empty()


async def test_more_than_four_mebibytes(model_dir: Path, tmp_path: Path) -> None:
    async with front_of(FakeShards(step_tokens=10_000), model_dir, tmp_path) as (stub, _):
        response = await stub.Prefill(prefill(0, text_request(0, "word " * 430_000, new=1)))
        assert response.generations[0].generated_text.generated_tokens == 1


async def test_a_lost_shard_breaks_the_front(model_dir: Path, tmp_path: Path) -> None:
    shards = FakeShards()
    async with front_of(shards, model_dir, tmp_path) as (stub, front):
        shards.failures["prefill"] = [ShardLost("shard 1 is unavailable")]
        with pytest.raises(grpc.aio.AioRpcError, match="shard 1 is unavailable"):
            await stub.Prefill(prefill(0, text_request(0, "hello")))
        with pytest.raises(ShardLost):
            await front.broken


async def test_the_socket_appears_last_replaces_a_stale_one_and_goes(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "front-0").write_text("left by a process that was killed")
    async with front_of(FakeShards(), model_dir, tmp_path):
        assert (tmp_path / "front-0").is_socket()
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("[rank]\nmin_rank = 3\n")
    required = ["--listen=unix:///l", "--model-id=/m", "--shard-urls=unix:///a,h:1"]

    def parsed(*flags: str, **env: str) -> FrontSettings:
        return front_settings(build_parser(env).parse_args(["front", *flags]))

    assert parsed(*required) == FrontSettings("/m", Path("/m"), "unix:///l", ("unix:///a", "h:1"))
    changed = parsed(*required, f"--policy={tmp_path}/p.toml", "--model-name=org/m", LOG_LEVEL="debug")
    assert changed.model_id == "org/m"
    assert changed.policy == replace(SteeringPolicy(), rank=RankPolicy(min_rank=3))
    assert changed.log == LogSettings("DEBUG")
    assert parsed(*required, "--no-steering").policy is None
    for missing, name in zip(required, ("listen", "model-id", "shard-urls"), strict=True):
        with pytest.raises(InvalidFlags, match=f"--{name} is missing"):
            parsed(*(flag for flag in required if flag != missing))


async def test_an_address_that_cannot_be_used(model_dir: Path, tmp_path: Path) -> None:
    front = await prepare(FrontSettings("m", model_dir, "", ()), FakeShards())
    with pytest.raises(UnsupportedModel, match="cannot listen on unix:///nowhere/at/all"):
        async with listening(front, "unix:///nowhere/at/all"):
            raise AssertionError("it listens")


@asynccontextmanager
async def served(
    tiny: TinyWorld, path: Path, policy: SteeringPolicy | None
) -> AsyncIterator[tuple[asyncio.Task[None], grpc.aio.Server]]:
    """`serve`, as the front process runs it, over a real engine."""
    driver = Driver(tiny.model, tiny.adapters)
    url = f"unix://{path}/shard"
    shard = build_server(driver.engine, driver.decisions, Lane(driver.engine.group), (url,))
    shard.add_insecure_port(f"unix:{path}/shard")
    await shard.start()
    settings = FrontSettings("tiny", tiny.model, f"unix://{path}/f-0", (url,), policy, startup_seconds=10)
    task = asyncio.create_task(serve(settings))
    try:
        while not (path / "f-0").exists():
            assert not task.done()
            await asyncio.sleep(0.01)
        yield task, shard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await shard.stop(None)
        assert not (path / "f-0").exists()
        driver.engine.check_integrity()


def asked(r: GenerationRequest) -> pb.Request:
    return text_request(r.id, r.inputs, r.stopping.max_new_tokens, adapter_id=r.adapter_id)


def steered_alone(tiny: TinyWorld, r: GenerationRequest, rung: int) -> list[int]:
    """The engine's own answer at one rung throughout."""
    driver = Driver(tiny.model, tiny.adapters)
    driver.steer(SteeringUpdate(1, (ChunkDecision(r.id, 0, rung),)))
    return driver.run(r, seq=1)[r.id]


@pytest.mark.parametrize("policy", [None, FULL], ids=["unsteered", "full-rank"])
async def test_joining_merging_and_filtering_change_no_answer(
    tiny: TinyWorld, tmp_path: Path, policy: SteeringPolicy | None
) -> None:
    adapters = [None, "a4", "a8", "a16"]
    wanted = [request(i, TEXT[: 9 + 3 * i], new=5 + i, adapter_id=adapters[i % 4]) for i in range(8)]
    driver = Driver(tiny.model, tiny.adapters)
    alone = {r.id: driver.run(r)[r.id] for r in wanted}

    def drive() -> dict[int, list[int]]:
        with TgiRouter(f"{tmp_path}/f") as router:
            first = router.prefill(0, [asked(r) for r in wanted[:3]])
            second = router.prefill(1, [asked(r) for r in wanted[3:5]])
            assert first is not None
            assert second is not None
            cached = router.decode(first, second)
            assert cached is not None
            cached = router.filter(cached, [0, 2, 3, 4])
            cached = router.prefill(2, [asked(r) for r in wanted[5:]], cached)
            while cached is not None:
                cached = router.decode(cached)
            (state,) = router.states()
            assert (state.sequences, state.steered_requests) == (0, 0)
            assert all(pages.used == 0 for pages in state.kv_pages)
            return router.tokens

    async with served(tiny, tmp_path, policy):
        got = await asyncio.to_thread(drive)
    assert got.pop(1) == alone[1][:2], "dropped by the filter after two tokens"
    del alone[1]
    assert got == alone


@pytest.mark.parametrize("rung", [1, 4])
async def test_a_policy_of_one_rank_answers_as_that_rank(tiny: TinyWorld, tmp_path: Path, rung: int) -> None:
    policy = replace(FULL, rank=RankPolicy(prompt_rung=rung, answer_rung=rung))
    r = request(0, TEXT, new=40, adapter_id="a16")
    full, low = Driver(tiny.model, tiny.adapters).run(r)[0], steered_alone(tiny, r, rung)
    assert low != full

    def drive() -> list[int]:
        with TgiRouter(f"{tmp_path}/f") as router:
            cached = router.prefill(0, [asked(r)])
            assert router.states()[0].steered_requests == 1
            while cached is not None:
                cached = router.decode(cached)
            return router.tokens[0]

    async with served(tiny, tmp_path, policy):
        assert await asyncio.to_thread(drive) == low


async def test_sigterm_ends_it_and_a_shard_that_goes_away_is_an_error(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_module, "_WATCH_S", 0.02)
    async with served(tiny, tmp_path, FULL) as (task, shard):
        signal.raise_signal(signal.SIGTERM)
        await asyncio.wait_for(task, 5)
        assert not (tmp_path / "f-0").exists()
    async with served(tiny, tmp_path, FULL) as (task, shard):
        await shard.stop(None)
        with pytest.raises(ShardLost):
            await asyncio.wait_for(task, 10)

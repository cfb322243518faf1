from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from chunkwise import wire
from chunkwise.config.settings import Limits
from chunkwise.core import (
    CachedBatch,
    ChunkDecision,
    GenerationFailed,
    ShardInfo,
    SteeringUpdate,
    StepResult,
    UnsupportedModel,
)
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import steering_pb2 as steer_pb
from chunkwise.pb.generate_pb2_grpc import (
    TextGenerationServiceServicer,
    add_TextGenerationServiceServicer_to_server,
)
from chunkwise.pb.steering_pb2_grpc import SteeringServiceServicer, add_SteeringServiceServicer_to_server
from chunkwise.router import shards as shards_module
from chunkwise.router.shards import GrpcShards, ShardLost
from fakes import ADAPTERS, FakeShards, toy_text
from routing import request

Context = grpc.aio.ServicerContext[Any, Any]


class FakeServer(TextGenerationServiceServicer):
    """generate.v3 of one shard process: a `FakeShards` behind real sockets. Only rank 0 sends generations and
    signals."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.shards = FakeShards()
        self.warmups: list[pb.WarmupRequest] = []
        self.sessions = 0
        self.streamed: list[int] = []
        self.closes = False
        self.supported: int | None = 512
        self.emitted: asyncio.Queue[steer_pb.StepSignals] = asyncio.Queue()

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        return wire.info_to_pb(await self.shards.info())

    async def Warmup(self, request: pb.WarmupRequest, context: Context) -> pb.WarmupResponse:
        self.warmups.append(request)
        return pb.WarmupResponse(
            max_supported_total_tokens=self.supported, max_input_tokens=100, max_total_tokens=128 - self.rank
        )

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.PrefillResponse:
        requests = [wire.request_from_pb(each) for each in request.batch.requests]
        cached = wire.cached_batch_from_pb(request.cached_batch) if request.HasField("cached_batch") else None
        await self._barrier(request.steering_seq)
        try:
            result = await self.shards.prefill(requests, request.batch.id, cached, request.steering_seq, request.step)
        except GenerationFailed as error:
            await context.abort(grpc.StatusCode.INTERNAL, str(error))
        await self._emit(request.step)
        response = wire.result_to_prefill_pb(result)
        if self.rank:
            del response.generations[:]
        return response

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.DecodeResponse:
        response = await self.step(request)
        await self._emit(request.step)
        return response

    async def step(self, request: pb.DecodeRequest) -> pb.DecodeResponse:
        batches = [wire.cached_batch_from_pb(each) for each in request.batches]
        await self._barrier(request.steering_seq)
        result = await self.shards.decode(batches, request.steering_seq, request.step, request.may_have_ended)
        response = wire.result_to_decode_pb(result)
        if self.rank:
            del response.generations[:]
        return response

    async def FilterBatch(self, request: pb.FilterBatchRequest, context: Context) -> pb.FilterBatchResponse:
        batch = await self.shards.filter_batch(request.batch_id, tuple(request.request_ids), request.steering_seq)
        return pb.FilterBatchResponse(batch=wire.cached_batch_to_pb(batch))

    async def ClearCache(self, request: pb.ClearCacheRequest, context: Context) -> pb.ClearCacheResponse:
        await self._barrier(request.steering_seq)
        await self.shards.clear_cache(request.id if request.HasField("id") else None, request.steering_seq)
        return pb.ClearCacheResponse()

    async def Health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        (state,) = await self.shards.health()
        return pb.HealthResponse(shard_state=wire.state_to_pb(state))

    async def ServiceDiscovery(
        self, request: pb.ServiceDiscoveryRequest, context: Context
    ) -> pb.ServiceDiscoveryResponse:
        return pb.ServiceDiscoveryResponse()

    async def _barrier(self, seq: int) -> None:
        while len(self.shards.updates) < seq:
            await asyncio.sleep(0.001)

    async def _emit(self, step: int) -> None:
        if self.rank == 0 and step:
            self.emitted.put_nowait(wire.signals_to_pb(await self.shards.signals(step)))


class FakeSteering(SteeringServiceServicer):
    """steering.v1 of the same process."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    async def Steer(
        self, request_iterator: AsyncIterator[steer_pb.SteeringUpdate], context: Context
    ) -> AsyncIterator[steer_pb.StepSignals]:
        self._server.sessions += 1

        async def receive() -> None:
            async for update in request_iterator:
                await self._server.shards.steer(wire.update_from_pb(update))

        receiving = asyncio.create_task(receive())
        try:
            while True:
                yield await self._server.emitted.get()
        finally:
            receiving.cancel()

    async def Decode(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: Context
    ) -> AsyncIterator[steer_pb.DecodeOutcome]:
        server = self._server
        async for wanted in request_iterator:
            server.streamed.append(wanted.step)
            try:
                outcome = steer_pb.DecodeOutcome(response=await server.step(wanted))
            except GenerationFailed as error:
                outcome = steer_pb.DecodeOutcome(error=str(error))
            else:
                if server.rank == 0 and wanted.step:
                    outcome.signals.CopyFrom(wire.signals_to_pb(await server.shards.signals(wanted.step)))
            yield outcome
            if server.closes:
                return


async def started(shard: FakeServer, path: Path, *, steerable: bool = True) -> grpc.aio.Server:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    add_TextGenerationServiceServicer_to_server(shard, server)
    if steerable:
        add_SteeringServiceServicer_to_server(FakeSteering(shard), server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    return server


@asynccontextmanager
async def group(
    path: Path, *, steered: bool = True, steerable: bool = True
) -> AsyncIterator[tuple[GrpcShards, list[FakeServer]]]:
    ranks = [FakeServer(rank) for rank in range(2)]
    servers = [await started(shard, path / f"s-{shard.rank}", steerable=steerable) for shard in ranks]
    shards = await GrpcShards.connect([f"unix://{path}/s-{i}" for i in range(2)], steered=steered, deadline_s=10)
    try:
        yield shards, ranks
    finally:
        await shards.close()
        for server in servers:
            await server.stop(None)


async def test_steps_reach_all_shards_and_one_answer_comes_back(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        await shards.steer(SteeringUpdate(1, (ChunkDecision(7, 0, 4, 0.5, 2),)))
        # The names that a real router gives are kept apart from each other here: request 7, batch 9, step 1.
        wanted = request(5, 3, adapter="law")
        result = await shards.prefill([wire.request_from_pb(pb_request(7))], 9, None, 1, 1)
        assert result.batch == CachedBatch(9, (7,), 0, 1)
        assert [generation.token.text for generation in result.generations] == list(toy_text(wanted, 1))
        assert (await shards.signals(1)).signals[0].position == 4
        result = await shards.decode([result.batch], 1, 2)
        result = await shards.decode([result.batch or CachedBatch(0, (), 0, 0)], 1, 3)
        assert result.batch is None
        assert result.generations[0].text is not None
        assert result.generations[0].text.text == toy_text(wanted, 3)
        assert result.total_ns == 2_000_000
        # Step 2 was never asked for, so it is skipped.
        assert (await shards.signals(3)).step == 3
        for rank in ranks:
            assert [call.name for call in rank.shards.named("prefill", "decode")] == ["prefill", "decode", "decode"]
            assert rank.shards.updates == [SteeringUpdate(1, (ChunkDecision(7, 0, 4, 0.5, 2),))]
            assert rank.streamed == [2, 3]


@pytest.mark.parametrize("steerable", [True, False])
async def test_without_steering_steps_are_streamed_if_the_shards_can(tmp_path: Path, steerable: bool) -> None:
    """A shard that knows nothing of steering.v1, as TGI's, gets plain calls."""
    async with group(tmp_path, steered=False, steerable=steerable) as (shards, ranks):
        result = await shards.prefill([wire.request_from_pb(pb_request(7))], 9, None, 0, 0)
        result = await shards.decode([result.batch or CachedBatch(0, (), 0, 0)], 0, 0)
        assert len(result.generations) == 1
        assert [rank.streamed for rank in ranks] == [[0] if steerable else []] * 2


async def test_a_step_may_be_sent_while_another_runs_and_be_given_up(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        batch = (await shards.prefill([wire.request_from_pb(pb_request(7))], 9, None, 0, 1)).batch
        assert batch is not None
        for rank in ranks:
            rank.shards.running.clear()
        running = asyncio.create_task(shards.decode([batch], 0, 2))
        given_up = asyncio.create_task(shards.decode([batch], 0, 3, may_have_ended=True))
        await asyncio.sleep(0.05)
        given_up.cancel()
        for rank in ranks:
            rank.shards.running.set()
        assert (await running).batch == batch
        # The third token was the last: it came with the step that nobody waited for.
        result = await shards.decode([batch], 0, 4, may_have_ended=True)
        assert (result.generations, result.batch) == ((), None)
        assert [rank.streamed for rank in ranks] == [[2, 3, 4]] * 2


async def test_a_streamed_step_that_fails_on_one_shard_fails_and_the_stream_goes_on(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        batch = (await shards.prefill([wire.request_from_pb(pb_request(7))], 9, None, 0, 1)).batch
        assert batch is not None
        ranks[1].shards.failures["decode"] = [GenerationFailed("no memory left")]
        with pytest.raises(GenerationFailed, match=r"s-1: no memory left") as failed:
            await shards.decode([batch], 0, 2)
        assert not isinstance(failed.value, ShardLost)
        await shards.clear_cache(None, 0)
        batch = (await shards.prefill([wire.request_from_pb(pb_request(8))], 10, None, 0, 3)).batch
        assert batch is not None
        assert (await shards.decode([batch], 0, 4)).batch == batch
        assert (await shards.signals(4)).step == 4


async def test_a_shard_that_closes_its_stream_of_steps_is_lost(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        batch = (await shards.prefill([wire.request_from_pb(pb_request(7))], 9, None, 0, 1)).batch
        assert batch is not None
        ranks[0].closes = True
        steps = [shards.decode([batch], 0, step, may_have_ended=True) for step in (2, 3)]
        first, second = await asyncio.gather(*steps, return_exceptions=True)
        assert isinstance(first, StepResult)
        assert isinstance(second, ShardLost)
        with pytest.raises(ShardLost, match="the shard has closed it"):
            await shards.decode([batch], 0, 4)


def pb_request(id: int) -> pb.Request:
    message = wire.request_to_pb(request(5, 3, adapter="law"))
    message.id = id
    return message


async def test_filter_clear_and_health(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        requests = [wire.request_from_pb(pb_request(id)) for id in (1, 2)]
        await shards.prefill(requests, 4, None, 0, 1)
        assert [state.sequences for state in await shards.health()] == [2, 2]
        assert (await shards.filter_batch(4, (2,), 0)).request_ids == (2,)
        await shards.clear_cache(4, 0)
        await shards.clear_cache(None, 0)
        for rank in ranks:
            assert [call.ids for call in rank.shards.named("clear_cache")] == [(4,), ()]
        assert [state.sequences for state in await shards.health()] == [0, 0]


async def test_sessions_are_opened_only_for_steering_and_before_any_update(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        await shards.health()
        assert [rank.sessions for rank in ranks] == [1, 1]
    async with group(tmp_path, steered=False) as (shards, ranks):
        await shards.health()
        assert [rank.sessions for rank in ranks] == [0, 0]


async def test_warmup_takes_the_smallest_answer(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        ranks[1].supported = 400
        limits = await shards.warmup(Limits(max_batch_prefill_tokens=32))
        assert (limits.max_input_tokens, limits.max_total_tokens) == (100, 127)
        assert limits.max_supported_total_tokens == 400
        (sent,) = ranks[0].warmups
        (only,) = sent.batch.requests
        assert (sent.batch.id, only.id, sent.max_prefill_tokens, only.truncate) == (0, 0, 32, 32)
        assert only.inputs == "_test " * 32
        assert only.stopping_parameters.max_new_tokens == 1
        assert not sent.HasField("max_input_tokens")
        assert not sent.HasField("max_total_tokens")


async def test_a_shard_that_names_no_cache_size_is_given_tgis(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        for rank in ranks:
            rank.supported = None
        assert (await shards.warmup(Limits())).max_supported_total_tokens == 16_000


async def test_a_call_fails_if_one_shard_fails(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        ranks[1].shards.failures["prefill"] = [GenerationFailed("no memory left")]
        with pytest.raises(GenerationFailed, match=r"s-1: no memory left"):
            await shards.prefill([wire.request_from_pb(pb_request(1))], 1, None, 0, 1)
        assert [state.sequences for state in await shards.health()] == [1, 0]


async def test_a_shard_that_hangs_after_another_failed_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a collective operation whose partner has left."""
    monkeypatch.setattr(shards_module, "_STRAGGLER_S", 0.05)
    async with group(tmp_path) as (shards, ranks):
        ranks[0].shards.failures["prefill"] = [GenerationFailed("no memory left")]
        ranks[1].shards.running.clear()
        with pytest.raises(ShardLost, match=r"1 shards are stuck.*no memory left"):
            await shards.prefill([wire.request_from_pb(pb_request(1))], 1, None, 0, 1)


async def test_a_message_of_many_megabytes_passes(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        long = request(5, 3, text="x" * 6_000_000)
        result = await shards.prefill([long], 1, None, 0, 1)
        assert len(result.generations) == 1
        assert len(ranks[1].shards.batches[1][0].request.inputs) == 6_000_000


async def test_shards_that_differ_are_refused(tmp_path: Path) -> None:
    async with group(tmp_path) as (shards, ranks):
        assert (await shards.info()).adapters == ADAPTERS
        info = ranks[1].shards.shard_info
        ranks[1].shards.shard_info = ShardInfo(info.dtype, "cpu", info.page_size, 256, info.model_sha, ADAPTERS[:1])
        with pytest.raises(UnsupportedModel, match=r"s-1 serves another model revision, data type"):
            await shards.info()


async def test_connecting_waits_for_a_shard_that_starts_late(tmp_path: Path) -> None:
    async def late() -> grpc.aio.Server:
        await asyncio.sleep(0.3)
        return await started(FakeServer(0), tmp_path / "late")

    starting = asyncio.create_task(late())
    shards = await GrpcShards.connect([f"unix://{tmp_path}/late"], steered=True, deadline_s=20)
    assert len(await shards.health()) == 1
    await shards.close()
    await (await starting).stop(None)


async def test_connecting_gives_up_at_its_deadline(tmp_path: Path) -> None:
    with pytest.raises(ShardLost, match=r"nobody did not answer before the deadline"):
        await GrpcShards.connect([f"unix://{tmp_path}/nobody"], steered=True, deadline_s=0.4)


async def test_a_shard_that_goes_away_is_lost_and_not_merely_failing(tmp_path: Path) -> None:
    server = await started(FakeServer(0), tmp_path / "s")
    shards = await GrpcShards.connect([f"unix://{tmp_path}/s"], steered=True, deadline_s=10)
    waiting = asyncio.create_task(shards.signals(1))
    await shards.health()
    await server.stop(None)
    with pytest.raises(ShardLost):
        await waiting
    with pytest.raises(ShardLost):
        await shards.health()
    with pytest.raises(ShardLost):
        await shards.steer(SteeringUpdate(1))
    await shards.close()

"""The gRPC face of a shard, driven by a raw client as TGI's router would: messages, statuses, the Steer stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from chunkwise import wire
from chunkwise.core import ChunkDecision, SteeringUpdate
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import generate_pb2_grpc as pb_grpc
from chunkwise.pb import steering_pb2 as steer_pb
from chunkwise.pb import steering_pb2_grpc as steer_grpc
from chunkwise.shard.lane import Lane
from chunkwise.shard.server import build_server
from conftest import TinyWorld
from serving import Driver, request


class Client:
    """Both stubs on one channel, and the lane behind it."""

    def __init__(self, channel: grpc.aio.Channel, lane: Lane) -> None:
        self.lane = lane
        self.generate = pb_grpc.TextGenerationServiceStub(channel)
        self.steering = steer_grpc.SteeringServiceStub(channel)


@pytest.fixture
async def client(tiny: TinyWorld, tmp_path: Path) -> AsyncIterator[Client]:
    driver = Driver(tiny.model, tiny.adapters)
    url = f"unix:{tmp_path}/shard-0"
    lane = Lane(driver.engine.group)
    server = build_server(driver.engine, driver.decisions, lane, (f"unix://{tmp_path}/shard-0",))
    server.add_insecure_port(url)
    await server.start()
    async with grpc.aio.insecure_channel(url) as channel:
        yield Client(channel, lane)
        state = (await Client(channel, lane).generate.Health(pb.HealthRequest())).shard_state
        assert (state.sequences, state.steered_requests) == (0, 0)
        assert all(pages.used == 0 for pages in state.kv_pages)
    await server.stop(None)


def _prefill(batch_id: int, *ids: int, new: int = 4, **extra: object) -> pb.PrefillRequest:
    requests = [request(id, new=new, **extra) for id in ids]
    return pb.PrefillRequest(batch=wire.batch_to_pb(batch_id, requests))


async def test_bring_up(client: Client) -> None:
    info = await client.generate.Info(pb.InfoRequest())
    assert info.block_size >= 1
    assert info.support_chunking
    assert not info.use_prefix_caching
    assert not info.HasField("window_size")
    assert [a.adapter_id for a in info.adapters] == ["a16", "a4", "a8"]
    assert list(info.adapters[2].rungs) == [0, 0.25, 0.5, 1, 2, 4, 8]
    found = await client.generate.ServiceDiscovery(pb.ServiceDiscoveryRequest())
    assert found.urls[0].startswith("unix://")
    for id in (None, 5):
        await client.generate.ClearCache(pb.ClearCacheRequest(id=id))


async def test_the_life_of_a_batch(client: Client) -> None:
    first = await client.generate.Prefill(_prefill(0, 0))
    (generation,) = first.generations
    tokens = generation.tokens
    assert len(tokens.ids) == len(tokens.logprobs) == len(tokens.texts) == len(tokens.is_special) == 1
    assert (first.batch.id, list(first.batch.request_ids), first.batch.size) == (0, [0], 1)
    second = await client.generate.Prefill(_prefill(1, 1))
    merged = await client.generate.Decode(pb.DecodeRequest(batches=[first.batch, second.batch]))
    assert list(merged.batch.request_ids) == [0, 1]
    filtered = await client.generate.FilterBatch(pb.FilterBatchRequest(batch_id=merged.batch.id, request_ids=[1]))
    assert list(filtered.batch.request_ids) == [1]
    response = await client.generate.Decode(pb.DecodeRequest(batches=[filtered.batch]))
    response = await client.generate.Decode(pb.DecodeRequest(batches=[response.batch]))
    assert not response.HasField("batch")
    assert response.generations[0].generated_text.generated_tokens == 4


async def test_prefill_joins_the_cached_batch(client: Client) -> None:
    first = await client.generate.Prefill(_prefill(0, 0, new=2))
    joined = _prefill(1, 1, new=1)
    joined.cached_batch.CopyFrom(first.batch)
    response = await client.generate.Prefill(joined)
    assert {g.request_id for g in response.generations} == {0, 1}
    assert not response.HasField("batch")


async def test_statuses_by_type(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await client.generate.Decode(pb.DecodeRequest(batches=[pb.CachedBatch(id=77)]))
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "77" in (failed.value.details() or "")
    response = await client.generate.Prefill(_prefill(0, 3, new=1, adapter_id="nobody"))
    assert "nobody" in response.generations[0].error.message


async def test_messages_over_four_mebibytes_are_accepted(client: Client) -> None:
    big = _prefill(0, 0, new=1)
    big.batch.requests[0].input_chunks.chunks.add(image=pb.Image(data=bytes(5 << 20), mimetype="image/png"))
    response = await client.generate.Prefill(big)
    assert response.generations[0].HasField("generated_text")


async def test_liveness_prefill_beside_a_running_batch(client: Client) -> None:
    first = await client.generate.Prefill(_prefill(0, 0, new=8))
    probe = _prefill(2**64 - 1, 2**64 - 1, new=1, truncate=1, add_special_tokens=False)
    probe.batch.requests[0].slots.append(0)
    running, alive = await asyncio.gather(
        client.generate.Decode(pb.DecodeRequest(batches=[first.batch])), client.generate.Prefill(probe)
    )
    assert not alive.HasField("batch")
    assert alive.generations[0].request_id == 2**64 - 1
    await client.generate.ClearCache(pb.ClearCacheRequest(id=running.batch.id))


async def test_steering_stream_carries_decisions_down_and_signals_up(client: Client) -> None:
    stream = client.steering.Steer()
    base = await client.generate.Prefill(_prefill(0, 0, new=1))
    adapted = await client.generate.Prefill(_prefill(0, 0, new=1, adapter_id="a16"))
    await stream.write(wire.update_to_pb(SteeringUpdate(1, chunks=(ChunkDecision(5, 0, rung=0),))))
    steered = _prefill(0, 5, new=2, adapter_id="a16")
    steered.steering_seq, steered.step = 1, 41
    response = await client.generate.Prefill(steered)
    first = [r.generations[0].tokens.logprobs[0] for r in (base, adapted, response)]
    assert first[2] == pytest.approx(first[0], abs=1e-4)
    assert first[2] != pytest.approx(first[1], abs=1e-4)
    signals = await stream.read()
    assert isinstance(signals, steer_pb.StepSignals)
    assert signals.step == 41
    (signal,) = signals.signals
    assert (signal.request_id, signal.position) == (5, len("Hello there, General.") - 1)
    assert 0.0 < signal.entropy < 1.0
    assert 0.0 < signal.attention_spread < 1.0
    await client.generate.ClearCache(pb.ClearCacheRequest())
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


async def test_a_gap_in_the_updates_ends_the_stream_alone(client: Client) -> None:
    stream = client.steering.Steer()
    await stream.write(steer_pb.SteeringUpdate(seq=2))
    with pytest.raises(grpc.aio.AioRpcError, match="without gaps"):
        await stream.read()
    assert (await client.generate.Prefill(_prefill(0, 0, new=1))).generations


async def test_streamed_steps_are_those_of_decode_and_carry_their_signals(client: Client) -> None:
    steer = client.steering.Steer()
    plain: list[int] = []
    batch = (await client.generate.Prefill(_prefill(0, 0))).batch
    while batch.request_ids:
        response = await client.generate.Decode(pb.DecodeRequest(batches=[batch]))
        plain.extend(response.generations[0].tokens.ids)
        batch = response.batch
    stream = client.steering.Decode()
    batch = (await client.generate.Prefill(_prefill(1, 1))).batch
    # All are sent before the first has ended; the last finds the batch ended.
    for step in (11, 12, 0, 14):
        await stream.write(pb.DecodeRequest(batches=[batch], step=step, may_have_ended=True))
    outcomes = [await stream.read() for _ in range(4)]
    assert all(isinstance(outcome, steer_pb.DecodeOutcome) and not outcome.error for outcome in outcomes)
    found = [outcome for outcome in outcomes if isinstance(outcome, steer_pb.DecodeOutcome)]
    assert [id for outcome in found for g in outcome.response.generations for id in g.tokens.ids] == plain
    assert [o.signals.step if o.HasField("signals") else None for o in found] == [11, 12, None, 14]
    assert [signal.request_id for signal in found[0].signals.signals] == [1]
    assert found[3].HasField("response")
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    await steer.done_writing()
    assert await steer.read() is grpc.aio.EOF


async def test_a_streamed_step_that_fails_leaves_the_stream_open(client: Client) -> None:
    stream = client.steering.Decode()
    await stream.write(pb.DecodeRequest(batches=[pb.CachedBatch(id=77)]))
    await stream.write(pb.DecodeRequest())
    first, second = await stream.read(), await stream.read()
    assert isinstance(first, steer_pb.DecodeOutcome)
    assert isinstance(second, steer_pb.DecodeOutcome)
    assert "77" in first.error
    assert "names no batch" in second.error
    assert not first.HasField("response")


async def test_a_stream_that_is_broken_off_harms_no_other_call(client: Client) -> None:
    batch = (await client.generate.Prefill(_prefill(0, 0, new=8))).batch
    stream = client.steering.Decode()
    for _ in range(3):
        await stream.write(pb.DecodeRequest(batches=[batch], may_have_ended=True))
    await stream.read()
    stream.cancel()
    await client.generate.ClearCache(pb.ClearCacheRequest())
    batch = (await client.generate.Prefill(_prefill(1, 1, new=2))).batch
    stream = client.steering.Decode()
    await stream.write(pb.DecodeRequest(batches=[batch]))
    outcome = await stream.read()
    assert isinstance(outcome, steer_pb.DecodeOutcome)
    assert outcome.response.generations[0].HasField("generated_text")


async def test_a_shard_that_shuts_down_ends_a_stream_in_use(client: Client) -> None:
    batch = (await client.generate.Prefill(_prefill(0, 0, new=2))).batch
    stream = client.steering.Decode()
    await stream.write(pb.DecodeRequest(batches=[batch]))
    assert isinstance(await stream.read(), steer_pb.DecodeOutcome)
    client.lane.close()
    await stream.write(pb.DecodeRequest(batches=[batch], may_have_ended=True))
    with pytest.raises(grpc.aio.AioRpcError, match="the shard is shutting down") as failed:
        await stream.read()
    assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.aio.AioRpcError, match="the shard is shutting down"):
        await client.generate.ClearCache(pb.ClearCacheRequest())

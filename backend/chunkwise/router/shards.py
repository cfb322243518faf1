"""The tensor-parallel shards as one: every call goes to all of them, and one answer comes back.

It does not decide what to send, or when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from chunkwise import wire
from chunkwise.config.settings import Limits
from chunkwise.core import (
    CachedBatch,
    GenerationFailed,
    GenerationRequest,
    ShardInfo,
    ShardState,
    SteeringUpdate,
    StepResult,
    StepSignals,
    UnsupportedModel,
    WarmupLimits,
)
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import steering_pb2 as steer_pb
from chunkwise.pb.generate_pb2_grpc import TextGenerationServiceStub
from chunkwise.pb.steering_pb2_grpc import SteeringServiceStub
from chunkwise.router.decode_stream import Call, DecodeStream
from chunkwise.router.shard_group import ShardLost, Shards
from chunkwise.router.warmup import warmup_prompt

if TYPE_CHECKING:
    # This name exists in the generated stubs alone.
    from chunkwise.pb.generate_pb2_grpc import TextGenerationServiceAsyncStub

__all__ = ["GrpcShards", "ShardLost", "Shards"]

_T = TypeVar("_T")
_SteerCall = grpc.aio.StreamStreamCall[steer_pb.SteeringUpdate, steer_pb.StepSignals]

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_RETRY_S = 0.2
_HEALTH_TIMEOUT_S = 10.0
# Once one shard has failed, the others may wait for it inside a collective operation for ever.
_STRAGGLER_S = 15.0
# What TGI assumes of a server that does not tell the size of its cache.
_DEFAULT_TOTAL_TOKENS = 16_000

_log = logging.getLogger(__name__)


def _failure(url: str, error: grpc.aio.AioRpcError) -> GenerationFailed:
    text = error.details() or str(error.code())
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return ShardLost(f"shard {url} is unavailable: {text}")
    return GenerationFailed(f"shard {url}: {text}")


async def _all(calls: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results of all calls; if one fails, its error, once no call is under way any more."""
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        late: set[asyncio.Future[_T]] = set()
        if pending:
            _, late = await asyncio.wait(pending, timeout=_STRAGGLER_S)
        errors = [error for task in tasks if task.done() and (error := task.exception()) is not None]
        if late:
            raise ShardLost(f"{len(late)} shards are stuck {_STRAGGLER_S:.0f} s after another failed: {errors[0]}")
        for error in sorted(errors, key=lambda e: not isinstance(e, ShardLost)):
            raise error
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


async def _streams_steps(call: Call) -> bool:
    """Whether a shard has the stream of steps; ``call`` is one without any. If it fails otherwise, so will the next."""
    try:
        await call.done_writing()
        await call.read()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return await call.code() is not grpc.StatusCode.UNIMPLEMENTED
    return True


def _identity(info: ShardInfo) -> ShardInfo:
    return replace(info, device_type="")


def _target(url: str) -> str:
    return f"unix:{url.removeprefix('unix://')}" if url.startswith("unix://") else url


class GrpcShards:
    """`Shards` over generate.v3 and two streams per shard of steering.v1: Decode where the shards have it, Steer if
    steered. Made by `connect`."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = tuple(urls)
        self._channels = [grpc.aio.insecure_channel(_target(url), options=_CHANNEL_OPTIONS) for url in urls]
        self._stubs: list[TextGenerationServiceAsyncStub] = [TextGenerationServiceStub(c) for c in self._channels]
        self._steers: list[_SteerCall] = []
        self._decodes: list[DecodeStream] = []
        self._signals: dict[int, StepSignals] = {}

    @classmethod
    async def connect(cls, urls: Sequence[str], *, steered: bool, deadline_s: float) -> GrpcShards:
        """Waits until every shard answers, for ``deadline_s`` seconds at most, and opens the streams. Shards that know
        nothing of steering.v1, as TGI's, will do unless ``steered``.

        Raises:
            ShardLost: a shard did not answer in time.
        """
        shards = cls(urls)
        deadline = asyncio.get_running_loop().time() + deadline_s
        try:
            await _all([shards._reach(rank, deadline) for rank in range(len(urls))])
            stubs = [SteeringServiceStub(channel) for channel in shards._channels]
            if steered:
                shards._steers = [stub.Steer() for stub in stubs]
            if steered or all(await _all([_streams_steps(stub.Decode()) for stub in stubs])):
                shards._decodes = [DecodeStream(url, stub.Decode()) for url, stub in zip(urls, stubs, strict=True)]
        except BaseException:
            await shards.close()
            raise
        return shards

    async def info(self) -> ShardInfo:
        """See `Shards`. Raises UnsupportedModel if the shards do not serve the same."""
        infos = [wire.info_from_pb(info) for info in await self._each(lambda stub: stub.Info(pb.InfoRequest()))]
        for url, info in zip(self._urls, infos, strict=True):
            if _identity(info) != _identity(infos[0]):
                raise UnsupportedModel(
                    f"shard {url} serves another model revision, data type, page size or adapters than "
                    f"{self._urls[0]}; start all shards with the same model and adapters"
                )
        return infos[0]

    async def warmup(self, limits: Limits) -> WarmupLimits:
        """See `Shards`. The smallest answer counts."""
        request = pb.WarmupRequest(
            batch=wire.batch_to_pb(0, [warmup_prompt(limits)]),
            max_input_tokens=limits.max_input_tokens,
            max_prefill_tokens=limits.step_tokens,
            max_total_tokens=limits.max_total_tokens,
        )
        answers = await self._each(lambda stub: stub.Warmup(request))
        supported, max_input, max_total = min(
            (a.max_supported_total_tokens, a.max_input_tokens, a.max_total_tokens) for a in answers
        )
        fallback = max(_DEFAULT_TOTAL_TOKENS, max_total, limits.step_tokens)
        return WarmupLimits(max_input, max_total, supported or fallback)

    async def prefill(
        self, requests: Sequence[GenerationRequest], batch_id: int, cached: CachedBatch | None, seq: int, step: int
    ) -> StepResult:
        """See `Shards`."""
        request = pb.PrefillRequest(
            batch=wire.batch_to_pb(batch_id, requests),
            cached_batch=wire.cached_batch_to_pb(cached) if cached is not None else None,
            steering_seq=seq,
            step=step,
        )
        return self._joined(await self._each(lambda stub: stub.Prefill(request)))

    async def decode(
        self, batches: Sequence[CachedBatch], seq: int, step: int, may_have_ended: bool = False
    ) -> StepResult:
        """See `Shards`."""
        cached = [wire.cached_batch_to_pb(batch) for batch in batches]
        request = pb.DecodeRequest(batches=cached, steering_seq=seq, step=step, may_have_ended=may_have_ended)
        if not self._decodes:
            return self._joined(await self._each(lambda stub: stub.Decode(request)))
        outcomes = await _all([stream.decode(request) for stream in self._decodes])
        if outcomes[0].HasField("signals"):
            self._signals[step] = wire.signals_from_pb(outcomes[0].signals)
        return self._joined([outcome.response for outcome in outcomes])

    async def filter_batch(self, batch_id: int, request_ids: Sequence[int], seq: int) -> CachedBatch:
        """See `Shards`."""
        request = pb.FilterBatchRequest(batch_id=batch_id, request_ids=request_ids, steering_seq=seq)
        return wire.cached_batch_from_pb((await self._each(lambda stub: stub.FilterBatch(request)))[0].batch)

    async def clear_cache(self, batch_id: int | None, seq: int) -> None:
        """See `Shards`."""
        request = pb.ClearCacheRequest(id=batch_id, steering_seq=seq)
        await self._each(lambda stub: stub.ClearCache(request))

    async def health(self) -> tuple[ShardState, ...]:
        """See `Shards`. A shard that does not answer within ten seconds has failed."""
        answers = await self._each(lambda stub: stub.Health(pb.HealthRequest(), timeout=_HEALTH_TIMEOUT_S))
        return tuple(wire.state_from_pb(answer.shard_state) for answer in answers)

    async def steer(self, update: SteeringUpdate) -> None:
        """See `Shards`."""
        message = wire.update_to_pb(update)
        await _all([self._write(rank, message) for rank in range(len(self._steers))])

    async def signals(self, step: int) -> StepSignals:
        """See `Shards`. Those of streamed steps have come with the outcome. Raises ShardLost also when the stream is
        already past that step."""
        came = self._signals.pop(step, None)
        self._signals = {later: signals for later, signals in self._signals.items() if later > step}
        if came is not None:
            return came
        while True:
            message = await self._read_signals()
            if message.step == step:
                return wire.signals_from_pb(message)
            if message.step > step:
                raise ShardLost(f"shard {self._urls[0]} sent signals of step {message.step}, but none of step {step}")

    async def close(self) -> None:
        """See `Shards`."""
        for call in self._steers:
            call.cancel()
        for stream in self._decodes:
            stream.close()
        for channel in self._channels:
            await channel.close()

    async def _reach(self, rank: int, deadline: float) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            try:
                await self._stubs[rank].Info(
                    pb.InfoRequest(), wait_for_ready=True, timeout=max(_RETRY_S, deadline - clock())
                )
                return
            except grpc.aio.AioRpcError as error:
                if clock() >= deadline:
                    raise ShardLost(
                        f"shard {self._urls[rank]} did not answer before the deadline ({error.details()}); "
                        "look at the shard's log"
                    ) from error
                _log.info("waiting for shard %s: %s", self._urls[rank], error.details())
                await asyncio.sleep(_RETRY_S)

    async def _each(self, call: Callable[[TextGenerationServiceAsyncStub], Awaitable[_T]]) -> list[_T]:
        async def answer(url: str, answer: Awaitable[_T]) -> _T:
            try:
                return await answer
            except grpc.aio.AioRpcError as error:
                raise _failure(url, error) from error

        # Every call is made before the first is waited for, and is on its way one turn of the event loop later.
        calls = [call(stub) for stub in self._stubs]
        return await _all([answer(url, call) for url, call in zip(self._urls, calls, strict=True)])

    async def _write(self, rank: int, message: steer_pb.SteeringUpdate) -> None:
        try:
            await self._steers[rank].write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise ShardLost(f"the steering session with shard {self._urls[rank]} has ended: {error}") from error

    async def _read_signals(self) -> steer_pb.StepSignals:
        try:
            message = await self._steers[0].read()
        except grpc.aio.AioRpcError as error:
            raise ShardLost(f"the steering session with shard {self._urls[0]} has ended: {error.details()}") from error
        if not isinstance(message, steer_pb.StepSignals):
            raise ShardLost(f"shard {self._urls[0]} has closed the steering session")
        return message

    def _joined(self, responses: Sequence[pb.PrefillResponse] | Sequence[pb.DecodeResponse]) -> StepResult:
        results = [wire.result_from_pb(response) for response in responses]
        if len(results) == 1:
            return results[0]
        slowest = max(results, key=lambda result: result.total_ns)
        generations = tuple(generation for result in results for generation in result.generations)
        return replace(slowest, generations=generations, batch=results[0].batch)

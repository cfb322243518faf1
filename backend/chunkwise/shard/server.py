"""The gRPC face of a shard: generate.v3 and steering.v1 on one socket. Translates and serialises; decides nothing.

The event loop only translates. Everything that touches the model runs on the lane's thread, so Health and the Steer
stream are answered while a step runs.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import grpc
from google.protobuf.message import Message

from chunkwise import wire
from chunkwise.core import ChunkwiseError, InvalidRequest, SteeringViolation, StepResult, StepSignals
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import generate_pb2_grpc as pb_grpc
from chunkwise.pb import steering_pb2 as steer_pb
from chunkwise.pb import steering_pb2_grpc as steer_grpc
from chunkwise.shard.decisions import DecisionTable, SteeringSession
from chunkwise.shard.engine import Engine
from chunkwise.shard.lane import Lane, ShuttingDown

P = ParamSpec("P")
R = TypeVar("R")
Context = grpc.aio.ServicerContext[Any, Any]
_Step = tuple[StepResult, StepSignals]

logger = logging.getLogger(__name__)

_STATUS: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    SteeringViolation: grpc.StatusCode.FAILED_PRECONDITION,
    ShuttingDown: grpc.StatusCode.UNAVAILABLE,
}


def _decoding(engine: Engine, request: pb.DecodeRequest) -> Callable[[], _Step]:
    batch_ids = [batch.id for batch in request.batches]
    return functools.partial(engine.decode, batch_ids, request.steering_seq, request.step, request.may_have_ended)


def _reports(engine: Engine, signals: StepSignals) -> bool:
    return engine.group.rank == 0 and signals.step != 0


class SignalOutlet:
    """Hands step signals to the open Steer stream; without one they are dropped. For the event loop's thread alone."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[StepSignals] | None = None

    @contextmanager
    def open(self) -> Iterator[asyncio.Queue[StepSignals]]:
        """A queue that gets all signals from now on; an earlier one gets no more."""
        queue: asyncio.Queue[StepSignals] = asyncio.Queue()
        self._queue = queue
        try:
            yield queue
        finally:
            if self._queue is queue:
                self._queue = None

    def send(self, signals: StepSignals) -> None:
        """Passes the signals of one step on."""
        if self._queue is not None:
            self._queue.put_nowait(signals)


def _explain(error: BaseException) -> str:
    """What a caller is told of an error; one that is not ours is logged."""
    if isinstance(error, ChunkwiseError):
        return str(error)
    logger.error("unexpected error", exc_info=error)
    return f"{type(error).__name__}: {error}"


class SteeringService(steer_grpc.SteeringServiceServicer):
    """steering.v1: decisions in, signals out; and steps as a stream."""

    def __init__(self, engine: Engine, lane: Lane, decisions: DecisionTable, outlet: SignalOutlet) -> None:
        self._engine = engine
        self._lane = lane
        self._decisions = decisions
        self._outlet = outlet

    async def Steer(
        self, request_iterator: AsyncIterator[steer_pb.SteeringUpdate], context: Context
    ) -> AsyncIterator[steer_pb.StepSignals]:
        """One session; ends with the client's side of the stream, or with its first mistake."""
        receiving = asyncio.ensure_future(self._receive(self._decisions.start_session(), request_iterator))
        try:
            with self._outlet.open() as queue:
                async for signals in self._until(receiving, queue):
                    yield wire.signals_to_pb(signals)
            await receiving
        except SteeringViolation as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        finally:
            receiving.cancel()

    @staticmethod
    async def _until(ended: asyncio.Future[None], queue: asyncio.Queue[StepSignals]) -> AsyncIterator[StepSignals]:
        while True:
            following = asyncio.ensure_future(queue.get())
            try:
                waited: tuple[asyncio.Future[Any], ...] = (following, ended)
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    return
                yield following.result()
            finally:
                following.cancel()

    async def _receive(self, session: SteeringSession, updates: AsyncIterator[steer_pb.SteeringUpdate]) -> None:
        async for update in updates:
            self._decisions.receive(session, wire.update_from_pb(update))

    async def Decode(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: Context
    ) -> AsyncIterator[steer_pb.DecodeOutcome]:
        """Takes requests while a step runs, so that the next one need not wait for the outcome of the last."""
        steps: asyncio.Queue[asyncio.Future[_Step] | None] = asyncio.Queue()
        reading = asyncio.ensure_future(self._queue_steps(request_iterator, steps))
        try:
            while (step := await steps.get()) is not None:
                yield await self._outcome(step)
            await reading
        except ShuttingDown as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        finally:
            reading.cancel()

    async def _queue_steps(
        self, requests: AsyncIterator[pb.DecodeRequest], steps: asyncio.Queue[asyncio.Future[_Step] | None]
    ) -> None:
        try:
            async for request in requests:
                key = self._lane.key("Decode", request)
                steps.put_nowait(self._lane.submit(key, _decoding(self._engine, request)))
        finally:
            steps.put_nowait(None)

    async def _outcome(self, step: asyncio.Future[_Step]) -> steer_pb.DecodeOutcome:
        try:
            result, signals = await step
        except Exception as error:
            return steer_pb.DecodeOutcome(error=_explain(error))
        return wire.outcome_to_pb(result, signals if _reports(self._engine, signals) else None)


class TextGenerationService(pb_grpc.TextGenerationServiceServicer):
    """generate.v3 over an `Engine`. Rank 0 reports the signals of every step that names its number."""

    def __init__(self, engine: Engine, lane: Lane, urls: tuple[str, ...], outlet: SignalOutlet) -> None:
        self._engine = engine
        self._lane = lane
        self._urls = urls
        self._outlet = outlet

    async def _work(
        self, context: Context, request: Message, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Runs ``act`` when its turn has come; an error ends the call with the gRPC status of its type."""
        try:
            key = self._lane.key(type(request).__name__, request)
            return await self._lane.run(key, functools.partial(act, *args, **kwargs))
        except Exception as error:
            await context.abort(_STATUS.get(type(error), grpc.StatusCode.INTERNAL), _explain(error))
        raise AssertionError("abort always raises")

    def _report(self, signals: StepSignals) -> None:
        if _reports(self._engine, signals):
            self._outlet.send(signals)

    async def Health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        """Answers from the event loop, also while a step runs."""
        return pb.HealthResponse(shard_state=wire.state_to_pb(self._engine.state()))

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """As in generate.v3."""
        return wire.info_to_pb(self._engine.info())

    async def ServiceDiscovery(
        self, request: pb.ServiceDiscoveryRequest, context: Context
    ) -> pb.ServiceDiscoveryResponse:
        """As in generate.v3."""
        return pb.ServiceDiscoveryResponse(urls=self._urls)

    async def ClearCache(self, request: pb.ClearCacheRequest, context: Context) -> pb.ClearCacheResponse:
        """As in generate.v3."""
        batch_id = request.id if request.HasField("id") else None
        await self._work(context, request, self._engine.clear_cache, batch_id, request.steering_seq)
        return pb.ClearCacheResponse()

    async def FilterBatch(self, request: pb.FilterBatchRequest, context: Context) -> pb.FilterBatchResponse:
        """As in generate.v3."""
        batch = await self._work(
            context,
            request,
            self._engine.filter_batch,
            request.batch_id,
            tuple(request.request_ids),
            request.steering_seq,
        )
        return pb.FilterBatchResponse(batch=wire.cached_batch_to_pb(batch))

    async def Warmup(self, request: pb.WarmupRequest, context: Context) -> pb.WarmupResponse:
        """As in generate.v3."""
        limits = await self._work(
            context,
            request,
            self._engine.warmup,
            [wire.request_from_pb(r) for r in request.batch.requests],
            request.max_prefill_tokens,
            request.max_input_tokens if request.HasField("max_input_tokens") else None,
            request.max_total_tokens if request.HasField("max_total_tokens") else None,
        )
        return pb.WarmupResponse(
            max_supported_total_tokens=limits.max_supported_total_tokens,
            max_input_tokens=limits.max_input_tokens,
            max_total_tokens=limits.max_total_tokens,
        )

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.PrefillResponse:
        """As in generate.v3."""
        result, signals = await self._work(
            context,
            request,
            self._engine.prefill,
            request.batch.id,
            [wire.request_from_pb(r) for r in request.batch.requests],
            request.cached_batch.id if request.HasField("cached_batch") else None,
            request.steering_seq,
            request.step,
        )
        self._report(signals)
        return wire.result_to_prefill_pb(result)

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.DecodeResponse:
        """As in generate.v3."""
        result, signals = await self._work(context, request, _decoding(self._engine, request))
        self._report(signals)
        return wire.result_to_decode_pb(result)


def build_server(engine: Engine, decisions: DecisionTable, lane: Lane, urls: tuple[str, ...]) -> grpc.aio.Server:
    """A server with both services, bound to nothing yet. ``lane`` is where the engine was made; ``urls`` are the
    listening addresses of all shards, by rank."""
    outlet = SignalOutlet()
    # Without SO_REUSEPORT a second server on the same port fails instead of taking half of the calls.
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options)
    pb_grpc.add_TextGenerationServiceServicer_to_server(TextGenerationService(engine, lane, urls, outlet), server)
    steering = SteeringService(engine, lane, decisions, outlet)
    steer_grpc.add_SteeringServiceServicer_to_server(steering, server)
    return server

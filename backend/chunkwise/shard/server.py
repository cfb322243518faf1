"""The gRPC face of a shard: generate.v3 and steering.v1 on one socket. Translates and serialises; decides nothing.

The event loop only translates. Everything that touches the model runs on one worker thread, in order of arrival, so
Health and the Steer stream are answered while a step runs.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import grpc

from chunkwise import wire
from chunkwise.core import ChunkwiseError, InvalidRequest, SteeringViolation, StepSignals
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import generate_pb2_grpc as pb_grpc
from chunkwise.pb import steering_pb2 as steer_pb
from chunkwise.pb import steering_pb2_grpc as steer_grpc
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.engine import Engine

P = ParamSpec("P")
R = TypeVar("R")
Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)

_STATUS: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    SteeringViolation: grpc.StatusCode.FAILED_PRECONDITION,
}


class SignalOutlet:
    """Hands step signals from the worker thread to the open Steer stream; without one they are dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[StepSignals] | None = None

    def open(self) -> asyncio.Queue[StepSignals]:
        """A fresh queue; an earlier stream gets no more signals."""
        self._queue = asyncio.Queue()
        return self._queue

    def send(self, signals: StepSignals) -> None:
        """Callable from any thread."""
        self._loop.call_soon_threadsafe(self._put, signals)

    def _put(self, signals: StepSignals) -> None:
        if self._queue is not None:
            self._queue.put_nowait(signals)


class SteeringService(steer_grpc.SteeringServiceServicer):
    """steering.v1: decisions in, signals out."""

    def __init__(self, decisions: DecisionTable, outlet: SignalOutlet) -> None:
        self._decisions = decisions
        self._outlet = outlet

    async def Steer(
        self, request_iterator: AsyncIterator[steer_pb.SteeringUpdate], context: Context
    ) -> AsyncIterator[steer_pb.StepSignals]:
        """One session; ends with the client's side of the stream."""
        self._decisions.start_session()
        queue = self._outlet.open()
        receiving = asyncio.ensure_future(self._receive(request_iterator))
        try:
            while True:
                signals = asyncio.ensure_future(queue.get())
                await asyncio.wait({signals, receiving}, return_when=asyncio.FIRST_COMPLETED)
                if not signals.done():
                    signals.cancel()
                    break
                yield wire.signals_to_pb(signals.result())
            receiving.result()
        except SteeringViolation as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        finally:
            receiving.cancel()

    async def _receive(self, updates: AsyncIterator[steer_pb.SteeringUpdate]) -> None:
        async for update in updates:
            self._decisions.receive(wire.update_from_pb(update))


class TextGenerationService(pb_grpc.TextGenerationServiceServicer):
    """generate.v3 over an `Engine`.

    Args:
        urls: listening addresses of all shards, by rank.
        emits_signals: whether this is the rank that reports signals (rank 0).
    """

    def __init__(self, engine: Engine, urls: tuple[str, ...], outlet: SignalOutlet, *, emits_signals: bool) -> None:
        self._engine = engine
        self._urls = urls
        self._outlet = outlet
        self._emits_signals = emits_signals
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def _work(self, context: Context, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs ``act`` on the worker thread; an error ends the call with the gRPC status of its type."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._worker, functools.partial(act, *args, **kwargs))
        except ChunkwiseError as error:
            await context.abort(_STATUS.get(type(error), grpc.StatusCode.INTERNAL), str(error))
        except Exception as error:
            logger.exception("unexpected error")
            await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        raise AssertionError("abort always raises")

    def _report(self, signals: StepSignals) -> None:
        if self._emits_signals and signals.step:
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
        await self._work(context, self._engine.clear_cache, batch_id, request.steering_seq)
        return pb.ClearCacheResponse()

    async def FilterBatch(self, request: pb.FilterBatchRequest, context: Context) -> pb.FilterBatchResponse:
        """As in generate.v3."""
        batch = await self._work(
            context, self._engine.filter_batch, request.batch_id, tuple(request.request_ids), request.steering_seq
        )
        return pb.FilterBatchResponse(batch=wire.cached_batch_to_pb(batch))

    async def Warmup(self, request: pb.WarmupRequest, context: Context) -> pb.WarmupResponse:
        """As in generate.v3."""
        limits = await self._work(
            context,
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
        result, signals = await self._work(
            context, self._engine.decode, [batch.id for batch in request.batches], request.steering_seq, request.step
        )
        self._report(signals)
        return wire.result_to_decode_pb(result)


def build_server(
    engine: Engine, decisions: DecisionTable, urls: tuple[str, ...], *, emits_signals: bool
) -> grpc.aio.Server:
    """A server with both services, bound to nothing yet; call from a running event loop."""
    outlet = SignalOutlet(asyncio.get_running_loop())
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=unlimited)
    pb_grpc.add_TextGenerationServiceServicer_to_server(
        TextGenerationService(engine, urls, outlet, emits_signals=emits_signals), server
    )
    steer_grpc.add_SteeringServiceServicer_to_server(SteeringService(decisions, outlet), server)
    return server

"""The generate.v3 door: to a TGI router it looks like one shard, and behind it the real shards are steered.

It translates messages and keeps calls in order. What a call does to the batches is `relay`'s.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import grpc
import grpc.aio

from chunkwise import wire
from chunkwise.config.settings import FrontSettings, Limits
from chunkwise.core import ChunkwiseError, GenerationFailed, InvalidRequest, ShardState, UnsupportedModel
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb.generate_pb2_grpc import (
    TextGenerationServiceServicer,
    add_TextGenerationServiceServicer_to_server,
)
from chunkwise.router.helm import Helm, make_controller
from chunkwise.router.metrics import Metrics
from chunkwise.router.relay import Relay
from chunkwise.router.shard_group import ShardLost, Shards
from chunkwise.router.shards import GrpcShards
from chunkwise.router.watch import watch
from chunkwise.tokenizer import Tokenizer

_P = ParamSpec("_P")
_T = TypeVar("_T")
Context = grpc.aio.ServicerContext[Any, Any]

_UNIX = "unix://"
_WATCH_S = 5.0
_GRACE_S = 1.0
# Without SO_REUSEPORT a second server on the same port fails instead of taking half of the calls.
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
)

_log = logging.getLogger(__name__)


class Front(TextGenerationServiceServicer):
    """generate.v3 over a `Relay`. Calls that change something run one at a time, in order of arrival.

    Args:
        url: the only address that ServiceDiscovery names.
    """

    def __init__(self, relay: Relay, shards: Shards, url: str) -> None:
        self._relay = relay
        self._shards = shards
        self._url = url
        self._lock = asyncio.Lock()
        self._turns: set[asyncio.Task[Any]] = set()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the error after which the shards must be started anew."""

    async def Health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        """Answers at once, also while a step runs, with the state of the shard that holds most."""
        states = await self._answered(context, self._shards.health())
        return pb.HealthResponse(shard_state=wire.state_to_pb(max(states, key=_held)))

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """As in generate.v3."""
        return wire.info_to_pb(await self._answered(context, self._shards.info()))

    async def ServiceDiscovery(
        self, request: pb.ServiceDiscoveryRequest, context: Context
    ) -> pb.ServiceDiscoveryResponse:
        """This door alone: a TGI router must not reach past it."""
        return pb.ServiceDiscoveryResponse(urls=[self._url])

    async def ClearCache(self, request: pb.ClearCacheRequest, context: Context) -> pb.ClearCacheResponse:
        """As in generate.v3."""
        await self._in_turn(context, self._relay.clear, request.id if request.HasField("id") else None)
        return pb.ClearCacheResponse()

    async def FilterBatch(self, request: pb.FilterBatchRequest, context: Context) -> pb.FilterBatchResponse:
        """As in generate.v3."""
        batch = await self._in_turn(context, self._relay.filter, request.batch_id, tuple(request.request_ids))
        return pb.FilterBatchResponse(batch=wire.cached_batch_to_pb(batch))

    async def Warmup(self, request: pb.WarmupRequest, context: Context) -> pb.WarmupResponse:
        """As in generate.v3. Only the limits count: the shards get a warm-up prompt of the same size."""
        limits = Limits(
            max_input_tokens=request.max_input_tokens if request.HasField("max_input_tokens") else None,
            max_total_tokens=request.max_total_tokens if request.HasField("max_total_tokens") else None,
            max_batch_prefill_tokens=request.max_prefill_tokens,
        )
        agreed = await self._in_turn(context, self._relay.warmup, limits)
        return pb.WarmupResponse(
            max_supported_total_tokens=agreed.max_supported_total_tokens,
            max_input_tokens=agreed.max_input_tokens,
            max_total_tokens=agreed.max_total_tokens,
        )

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.PrefillResponse:
        """As in generate.v3."""
        requests = [wire.request_from_pb(each) for each in request.batch.requests]
        cached_id = request.cached_batch.id if request.HasField("cached_batch") else None
        result = await self._in_turn(context, self._relay.prefill, request.batch.id, requests, cached_id)
        return wire.result_to_prefill_pb(result)

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.DecodeResponse:
        """As in generate.v3."""
        result = await self._in_turn(context, self._relay.decode, [batch.id for batch in request.batches])
        return wire.result_to_decode_pb(result)

    async def close(self) -> None:
        """Ends what still runs."""
        for turn in self._turns:
            turn.cancel()
        await asyncio.gather(*self._turns, return_exceptions=True)

    async def _in_turn(
        self, context: Context, act: Callable[_P, Coroutine[Any, Any, _T]], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Runs ``act`` when all calls before it are done. It runs to its end even if the caller goes away: a step that
        is cut off half-way would leave the shards where nobody knows."""

        async def run() -> _T:
            async with self._lock:
                try:
                    return await act(*args, **kwargs)
                except Exception as error:
                    self._note(error)
                    raise

        turn = asyncio.create_task(run())
        self._turns.add(turn)
        turn.add_done_callback(self._turns.discard)
        return await self._answered(context, asyncio.shield(turn))

    def _note(self, error: Exception) -> None:
        recoverable = isinstance(error, InvalidRequest | GenerationFailed) and not isinstance(error, ShardLost)
        if not recoverable and not self.broken.done():
            self.broken.set_exception(error)

    async def _answered(self, context: Context, call: Awaitable[_T]) -> _T:
        """The result of ``call``; an error ends the RPC with the status of its type."""
        try:
            return await call
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ChunkwiseError as error:
            await context.abort(grpc.StatusCode.INTERNAL, str(error))
        raise AssertionError("abort always raises")


def _held(state: ShardState) -> tuple[int, int, int]:
    # The shards hold the same requests, so a difference between them is a leak, and shows.
    return state.sequences, state.steered_requests, sum(usage.pages for usage in state.kv)


async def serve(settings: FrontSettings) -> None:
    """Serves a TGI router until SIGTERM or SIGINT; the socket appears once all shards have answered.

    Raises:
        ShardLost: a shard did not come up or went away; whoever started it must start the group anew.
        UnsupportedModel: the model directory or the address cannot be used.
    """
    shards = await GrpcShards.connect(
        settings.shard_urls, steered=settings.policy is not None, deadline_s=settings.startup_seconds
    )
    try:
        front = await prepare(settings, shards)
        async with listening(front, settings.listen):
            _log.info("serving %s to a TGI router on %s", settings.model_id, settings.listen)
            await _stopped(front, shards)
    finally:
        await shards.close()


async def prepare(settings: FrontSettings, shards: Shards) -> Front:
    """Reads the tokenizer, asks the shards what they serve and puts the parts together. Nothing listens yet."""
    tokenizer = Tokenizer(settings.model_dir)
    info = await shards.info()
    adapters = {adapter.adapter_id: adapter for adapter in info.adapters}
    controller = make_controller(settings.policy, info)
    helm = Helm(shards, controller, adapters, Metrics(info.max_position_embeddings))
    base_names = {settings.model_id, Path(settings.model_id).name}
    relay = Relay(shards, helm, tokenizer, base_names=base_names, adapter_names=adapters)
    return Front(relay, shards, settings.listen)


@asynccontextmanager
async def listening(front: Front, url: str) -> AsyncIterator[None]:
    """Serves on ``url``. A unix socket takes its name only once it accepts: its appearance means readiness."""
    server = grpc.aio.server(options=_OPTIONS)
    add_TextGenerationServiceServicer_to_server(front, server)
    path = Path(url.removeprefix(_UNIX)) if url.startswith(_UNIX) else None
    bound = path.with_name(f"{path.name}.starting") if path is not None else None
    if bound is not None:
        bound.unlink(missing_ok=True)
    try:
        try:
            server.add_insecure_port(f"unix:{bound}" if bound is not None else url)
        except RuntimeError as error:
            raise UnsupportedModel(f"the front cannot listen on {url}: {error}; use another address") from error
        await server.start()
        if path is not None and bound is not None:
            bound.rename(path)
        yield
    finally:
        await server.stop(_GRACE_S)
        await front.close()
        if path is not None:
            path.unlink(missing_ok=True)


async def _stopped(front: Front, shards: Shards) -> None:
    """Returns on SIGTERM or SIGINT; raises when the shards must be started anew."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watching = asyncio.create_task(watch(shards, _WATCH_S), name="watch")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        ends: list[asyncio.Future[Any]] = [watching, front.broken, stopping]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for ended in ends:
            if ended.done():
                ended.result()
    finally:
        for task in (watching, stopping):
            task.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

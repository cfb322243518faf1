"""The router process: brings the shards up, and serves HTTP until it is told to stop or a shard is lost."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web

from chunkwise.config.settings import RouterSettings
from chunkwise.router.api.app import build_app
from chunkwise.router.api.serving import Serving
from chunkwise.router.api.validation import Validator
from chunkwise.router.helm import Helm, make_controller
from chunkwise.router.loop import Loop
from chunkwise.router.metrics import Metrics
from chunkwise.router.permits import Permits
from chunkwise.router.shard_group import Shards
from chunkwise.router.shards import GrpcShards
from chunkwise.router.warmup import capacity_of, fit_limits, usable_limits
from chunkwise.router.watch import watch
from chunkwise.tokenizer import Tokenizer

_WATCH_S = 5.0
_DRAIN_S = 0.05
_HANDLERS_S = 5.0

_log = logging.getLogger(__name__)


async def serve(settings: RouterSettings) -> None:
    """Runs a router until SIGTERM or SIGINT.

    Raises:
        ShardLost: a shard did not come up or went away; whoever started it must start the group anew.
        UnsupportedModel: the model directory or the limits cannot be served.
    """
    shards = await GrpcShards.connect(
        settings.shard_urls, steered=settings.policy is not None, deadline_s=settings.startup_seconds
    )
    try:
        await serve_with(settings, shards)
    finally:
        await shards.close()


async def serve_with(settings: RouterSettings, shards: Shards) -> None:
    """`serve` with shards that are connected."""
    serving = await prepare(settings, shards)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await _serve_until(stop, serving)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def prepare(settings: RouterSettings, shards: Shards) -> Serving:
    """Reads the tokenizer, agrees the limits with the shards and puts the router's parts together. Nothing runs yet."""
    tokenizer = Tokenizer(settings.model_dir)
    info = await shards.info()
    await shards.clear_cache(None, 0)
    limits = fit_limits(settings.limits, info)
    agreed = usable_limits(limits, await shards.warmup(limits), info)
    adapters = {adapter.adapter_id: adapter for adapter in info.adapters}
    metrics = Metrics(agreed.max_total_tokens)
    metrics.batch_total_tokens.set(agreed.max_supported_total_tokens)
    controller = make_controller(settings.policy, info)
    loop = Loop(
        shards,
        Helm(shards, controller, adapters, metrics),
        capacity_of(limits, agreed, info),
        metrics,
    )
    entropy = random.SystemRandom()
    validator = Validator(limits, agreed, tokenizer, adapters, lambda: entropy.getrandbits(64))
    return Serving(settings, info, shards, loop, validator, metrics, Permits(limits.max_concurrent_requests))


async def _bind(runner: web.AppRunner, hostname: str, port: int) -> web.BaseSite:
    """Listens on the address; on all addresses if the name means none, as TGI does: containers set HOSTNAME to names
    that nothing resolves."""
    try:
        socket.getaddrinfo(hostname, port)
    except socket.gaierror:
        _log.warning("hostname %r cannot be resolved; listening on 0.0.0.0", hostname)
        hostname = "0.0.0.0"
    site = web.TCPSite(runner, hostname, port)
    await site.start()
    return site


@asynccontextmanager
async def listening(serving: Serving) -> AsyncIterator[tuple[web.BaseSite, str]]:
    """Serves HTTP on the configured address; yields the listening site and its url. Open connections end on exit."""
    # A handler must be cancelled when its client goes away: that is how its request leaves the batch.
    runner = web.AppRunner(build_app(serving), handler_cancellation=True, access_log=None, shutdown_timeout=_HANDLERS_S)
    await runner.setup()
    try:
        site = await _bind(runner, serving.settings.hostname, serving.settings.port)
        host, port = runner.addresses[0][:2]
        yield site, f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        await runner.cleanup()


async def _serve_until(stop: asyncio.Event, serving: Serving) -> None:
    """Serves until ``stop`` is set, then lets what runs end. Ends at once, with its error, when a shard is lost."""
    async with listening(serving) as (site, url):
        batching = asyncio.create_task(serving.loop.run(), name="loop")
        watching = asyncio.create_task(watch(serving.shards, _WATCH_S), name="watch")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        tasks: list[asyncio.Task[Any]] = [batching, watching, stopping]
        try:
            _log.info("serving %s on %s", serving.settings.model_id, url)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in (batching, watching):
                if task.done():
                    task.result()
            _log.info("stopping: %d requests are in flight", serving.loop.in_flight)
            serving.loop.close()
            await site.stop()
            await _drain(serving)
        finally:
            # The loop tells every request that is still in flight, so its handler ends before the connections do.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(serving: Serving) -> None:
    """Waits for the running requests to end, for the grace time at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(serving.settings.grace_seconds):
            while serving.loop.in_flight:
                await asyncio.sleep(_DRAIN_S)

"""Brings one shard up: device, process group, model, adapters, last the socket, whose appearance means readiness."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from functools import partial
from pathlib import Path

import torch

from chunkwise.config.settings import ShardSettings
from chunkwise.core import UnsupportedModel
from chunkwise.hub import hub_commit, locate
from chunkwise.model.llama import Llama, target_slices
from chunkwise.model.parallel import DistributedGroup, Group, SingleProcess
from chunkwise.model.spec import load_spec
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.engine import Engine, EngineSettings
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.shard.lane import Lane
from chunkwise.shard.server import build_server
from chunkwise.shard.watermark import Watermark
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.errors import AdapterError
from chunkwise_adapters.format import load_adapter
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.store import AdapterStore

logger = logging.getLogger(__name__)

_UNIX = "unix://"
# Longer than any step of a healthy group, short enough that a lost rank does not hang the service for long.
_COLLECTIVE_TIMEOUT_SECONDS = 120
_GRACE_SECONDS = 10


def _device(rank: int) -> torch.device:
    return torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")


def _dtype(name: str | None, device: torch.device, checkpoint: str) -> torch.dtype:
    """The asked type; else fp32 on CPU, where half types are slower, and the checkpoint's own on GPU."""
    name = name or ("float32" if device.type == "cpu" else checkpoint)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedModel(f"the checkpoint's dtype {name!r} is unknown; set --dtype")
    return dtype


def _group(settings: ShardSettings, device: torch.device) -> Group:
    place = settings.parallel
    if place.world_size == 1:
        return SingleProcess()
    address = f"{place.master_addr}:{place.master_port}"
    return DistributedGroup(place.rank, place.world_size, address, device, _COLLECTIVE_TIMEOUT_SECONDS)


def _load_adapters(settings: ShardSettings, model: Llama) -> AdapterStore:
    store = AdapterStore(target_slices(model.spec, model.plan), model.dtype, model.device)
    for source in settings.adapters:
        start = time.perf_counter()
        try:
            weights = load_adapter(locate(source.source, source.revision), source.name, model.spec.target_shapes())
            adapter = store.add(build_ladder(weights))
        except AdapterError as error:
            raise UnsupportedModel(f"adapter {source.name!r} cannot be served: {error}") from error
        seconds = time.perf_counter() - start
        logger.info("adapter %s: rungs %s, %d bytes, %.1f s", source.name, adapter.rungs, adapter.bytes, seconds)
    return store


def load_engine(settings: ShardSettings, group: Group, device: torch.device, decisions: DecisionTable) -> Engine:
    """The engine of one rank. Call it from the thread that will run the engine.

    Raises:
        UnsupportedModel: a checkpoint, an adapter or a parallel layout that cannot be served.
    """
    threads = settings.threads or max((os.cpu_count() or 1) // settings.parallel.world_size, 1)
    torch.set_num_threads(threads)
    model_dir = locate(settings.model_id, settings.revision)
    tokenizer = Tokenizer(model_dir)
    dtype = _dtype(settings.dtype, device, load_spec(model_dir).dtype)
    model = Llama(model_dir, group, dtype, device)
    logger.info(
        "rank %d of %d holds %d query and %d KV heads in %s on %s, %d threads",
        group.rank,
        group.world_size,
        model.plan.n_heads,
        model.plan.n_kv_heads,
        model.dtype,
        device,
        threads,
    )
    engine_settings = EngineSettings(
        max_batch_total_tokens=settings.max_batch_total_tokens,
        prefix_caching=settings.prefix_caching,
        prefill_logprobs=settings.prefill_logprobs,
        model_sha=hub_commit(model_dir),
        watermark=Watermark(settings.watermark.gamma, settings.watermark.delta),
    )
    grammars = GrammarCompiler(model_dir, tokenizer.eos_ids)
    return Engine(model, tokenizer, _load_adapters(settings, model), decisions, grammars, engine_settings)


async def serve(settings: ShardSettings) -> None:
    """Serves until SIGTERM or SIGINT. Raises UnsupportedModel before anything is bound."""
    decisions, rank = DecisionTable(), settings.parallel.rank
    device = _device(rank)
    group = _group(settings, device)
    # Loaded on the lane's thread: a second thread that has used OpenMP would have a pool of its own, and with more pool
    # threads than cores libgomp stops spinning at barriers, which makes every small operation about twice as slow.
    lane = Lane(group)
    engine = await lane.run(0, partial(load_engine, settings, group, device, decisions))
    url = settings.urls[rank]
    server = build_server(engine, decisions, lane, settings.urls)
    if url.startswith(_UNIX):
        Path(url.removeprefix(_UNIX)).unlink(missing_ok=True)
    try:
        server.add_insecure_port(url.replace(_UNIX, "unix:", 1))
    except RuntimeError as error:
        raise UnsupportedModel(f"shard {rank} cannot listen on {url}; is the address in use?") from error
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopped.set)
    await server.start()
    logger.info("shard %d listens on %s", rank, url)
    await stopped.wait()
    await server.stop(_GRACE_SECONDS)
    if url.startswith(_UNIX):
        Path(url.removeprefix(_UNIX)).unlink(missing_ok=True)

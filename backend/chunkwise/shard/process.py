"""Brings one shard up: device, process group, adapters, model, last the socket, whose appearance means readiness."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from chunkwise.config.settings import ShardSettings
from chunkwise.core import UnsupportedModel
from chunkwise.hub import hub_commit, locate
from chunkwise.model.linear import FOUR_BITS
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import DistributedGroup, Group, SingleProcess
from chunkwise.model.spec import load_spec
from chunkwise.shard.adapters import load_adapters
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.engine import Engine, EngineSettings
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.shard.lane import Lane
from chunkwise.shard.server import build_server
from chunkwise.shard.watermark import Watermark
from chunkwise.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_UNIX = "unix://"
# Longer than any step of a healthy group, short enough that a lost rank does not hang the service for long.
_COLLECTIVE_TIMEOUT_SECONDS = 120
_GRACE_SECONDS = 10
_QUANTIZED = {"int8": torch.int8, "int4": FOUR_BITS}


def _device(rank: int) -> torch.device:
    return torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")


def _types(settings: ShardSettings, device: torch.device, checkpoint: str) -> tuple[torch.dtype, torch.dtype]:
    """What to compute in, and what to keep the base matrices in.

    A CPU's kernels compute in fp32 and read matrices of fp32, bf16, int8 or int4: bf16 is taken where the checkpoint
    is, for it widens exactly and is half the reading. Without kernels, in fp16, and on a GPU, both are the same.
    """
    name = settings.dtype or checkpoint
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedModel(f"the checkpoint's dtype {name!r} is unknown; set --dtype")
    if device.type != "cpu":
        return dtype, dtype
    if settings.quantize is not None:
        return torch.float32, _QUANTIZED[settings.quantize]
    if settings.dtype == "float16":
        return dtype, dtype
    return torch.float32, dtype if dtype == torch.bfloat16 else torch.float32


def _group(settings: ShardSettings, device: torch.device) -> Group:
    place = settings.parallel
    if place.world_size == 1:
        return SingleProcess()
    address = f"{place.master_addr}:{place.master_port}"
    return DistributedGroup(place.rank, place.world_size, address, device, _COLLECTIVE_TIMEOUT_SECONDS)


class _Arithmetic(NamedTuple):
    """What to compute in, what the base matrices are kept in, on how many threads, and whether with the CPU kernels."""

    dtype: torch.dtype
    storage: torch.dtype
    threads: int
    kernels: bool


def _set_up(settings: ShardSettings, model_dir: Path, device: torch.device) -> _Arithmetic:
    """The arithmetic that ``settings`` name, to which torch is set on the calling thread. Raises UnsupportedModel."""
    threads = settings.threads or max((os.cpu_count() or 1) // settings.parallel.world_size, 1)
    dtype, storage = _types(settings, device, load_spec(model_dir).dtype)
    if device.type == "cuda":
        # Triton launches on the current device, wherever the tensors are.
        torch.cuda.set_device(device)
    kernels = device.type == "cpu" and dtype == torch.float32
    if settings.quantize is not None and not kernels:
        raise UnsupportedModel(f"--quantize {settings.quantize} is for CPUs; this shard runs on {device}, leave it out")
    # Beside the kernels torch does little, and idle threads of its own would spin on the kernels' cores.
    torch.set_num_threads(1 if kernels else threads)
    return _Arithmetic(dtype, storage, threads, kernels)


def load_model(settings: ShardSettings, model_dir: Path, group: Group, device: torch.device) -> Llama:
    """The model of one rank, in the types and with the threads that ``settings`` name. Call it from the thread that
    will run it.

    Raises:
        UnsupportedModel: a checkpoint or a parallel layout that cannot be served.
    """
    dtype, storage, threads, kernels = _set_up(settings, model_dir, device)
    model = Llama(
        model_dir,
        group,
        dtype,
        device,
        storage=storage,
        kernel_threads=threads if kernels else None,
        cuda_graphs=settings.cuda_graphs,
    )
    logger.info(
        "rank %d of %d holds %d query and %d KV heads in %s on %s, %d threads",
        group.rank,
        group.world_size,
        model.plan.n_heads,
        model.plan.n_kv_heads,
        storage,
        device,
        threads,
    )
    return model


def load_engine(settings: ShardSettings, group: Group, device: torch.device, decisions: DecisionTable) -> Engine:
    """The engine of one rank. Call it from the thread that will run the engine.

    Raises:
        UnsupportedModel: a checkpoint, an adapter or a parallel layout that cannot be served.
    """
    model_dir = locate(settings.model_id, settings.revision)
    tokenizer = Tokenizer(model_dir)
    dtype = _set_up(settings, model_dir, device).dtype
    # Before the weights, so that what reading them takes for a while does not come on top.
    adapters = load_adapters(settings.adapters, model_dir, group, dtype, device, settings.adapter_slots)
    model = load_model(settings, model_dir, group, device)
    engine_settings = EngineSettings(
        max_batch_total_tokens=settings.max_batch_total_tokens,
        prefix_caching=settings.prefix_caching,
        prefill_logprobs=settings.prefill_logprobs,
        model_sha=hub_commit(model_dir),
        watermark=Watermark(settings.watermark.gamma, settings.watermark.delta),
    )
    grammars = GrammarCompiler(model_dir, tokenizer.eos_ids)
    return Engine(model, tokenizer, adapters, decisions, grammars, engine_settings)


async def serve(settings: ShardSettings) -> None:
    """Serves until SIGTERM or SIGINT. Raises UnsupportedModel before anything is bound."""
    decisions, rank = DecisionTable(), settings.parallel.rank
    device = _device(rank)
    group = _group(settings, device)
    # Loaded on the lane's thread: torch operations on a second thread would start a second pool of OpenMP threads, and
    # with more of them than cores every small operation takes about twice as long.
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
    # A stream of steps would go on through the time of grace.
    lane.close()
    await server.stop(_GRACE_SECONDS)
    if url.startswith(_UNIX):
        Path(url.removeprefix(_UNIX)).unlink(missing_ok=True)

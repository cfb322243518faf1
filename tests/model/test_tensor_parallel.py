"""World sizes 2, 3 and 4 equal one process: base, adapters at several rungs inside one sequence, prefill and decode.

Nine heads over three KV heads: 2 divides unevenly, 3 evenly, and at 4 a KV head is replicated.
"""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkwise.core import ChunkDecision
from chunkwise.model.parallel import DistributedGroup, Group, SingleProcess
from conftest import TinyWorld

PROMPT = list(b"Tensor parallel shards must agree to the last token of this text.")


def _serve(model: Path, adapters: dict[str, Path], group: Group) -> list[Tensor]:
    from stepping import Stepper

    stepper = Stepper(model, adapters, group=group)
    stepper.chunks[1] = [ChunkDecision(1, 0, rung=2), ChunkDecision(1, 30, rung=8, crossfade=6)]
    logits = [
        stepper.prefill(name, PROMPT, adapter) for name, adapter in (("base", None), ("a8", "a8"), ("a16", "a16"))
    ]
    for token in range(3):
        logits.extend(stepper.decode({"base": token, "a8": token + 1, "a16": token + 2}).values())
    if group.rank == 0:
        assert stepper.spread is not None
        logits.append(stepper.spread)
    return logits


def _worker(rank: int, world: int, port: int, model: Path, adapters: dict[str, Path], results: Any) -> None:
    torch.set_num_threads(1)
    group = DistributedGroup(rank, world, f"127.0.0.1:{port}", torch.device("cpu"), timeout_seconds=60)
    with torch.inference_mode():
        logits = _serve(model, adapters, group)
    results.put((rank, [tensor.numpy() for tensor in logits]))
    group.close()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_shards_equal_one_process(tiny: TinyWorld, world: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_worker, args=(rank, world, port, tiny.model, tiny.adapters, results), daemon=True)
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    try:
        got = dict(results.get(timeout=120) for _ in workers)
    finally:
        for worker in workers:
            worker.join(timeout=30)
    expected = _serve(tiny.model, tiny.adapters, SingleProcess())
    for tensor, want in zip(got[0], expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(tensor), want, atol=2e-4, rtol=1e-4)
    for rank in range(1, world):
        for mine, first in zip(got[rank], got[0], strict=False):
            assert (mine == first).all(), "every rank must hold the same bits, or the ranks would draw apart"

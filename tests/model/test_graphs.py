"""Decode steps replayed from a recording equal the same steps computed plainly.

The recording stands for a CUDA graph: it repeats the very operations and kernel launches of the run it was made from,
on the same tensors and with the same numbers, and looks at nothing else. What a step leaves on the host is stale on
a replay here, as it would be there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chunkwise.core import KvFormat
from chunkwise.kv.pages import PageRef
from chunkwise.model.graphs import (
    MOST_SEQUENCES,
    GraphDecoder,
    GraphKey,
    Result,
    at_least,
    fits_a_graph,
    graph_key,
    with_graphs,
)
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import SingleProcess
from chunkwise.model.step import StepInput, StepSpan
from chunkwise_adapters.ladder import RankLadder
from gpu import DEVICE, kernels
from gpu_check import compare, play
from gpu_session import Session, random_ladders
from tiny import make_model

CPU = torch.device("cpu")


def step_of(lengths: list[int], pages: list[PageRef] | None = None, scored: int = 0) -> StepInput:
    tokens = sum(lengths)
    spans = tuple(StepSpan(i, n, n, pages or [PageRef(KvFormat.FULL, 1)]) for i, n in enumerate(lengths))
    rows = torch.zeros(tokens, dtype=torch.int64)
    return StepInput(rows, rows, rows, rows[: len(lengths)], rows[:scored], rows[:scored], spans, ())


def test_sizes_are_powers_of_two() -> None:
    assert [at_least(n) for n in (1, 2, 3, 4, 5, 33, 64)] == [1, 2, 4, 4, 8, 64, 64]
    assert [at_least(n, 16) for n in (1, 16, 17)] == [16, 16, 32]


def test_a_key_covers_neighbouring_steps() -> None:
    mixed = [PageRef(KvFormat.FULL, 1), PageRef(KvFormat.INT8, 2)]
    assert graph_key(step_of([1, 1, 1]), 0) == GraphKey(4, 0, False)
    assert graph_key(step_of([1]), 5) == graph_key(step_of([1]), 64) == GraphKey(1, 64, False)
    assert graph_key(step_of([1, 1], mixed), 65) == GraphKey(2, 128, True)


def test_only_small_pure_decode_steps_fit() -> None:
    assert fits_a_graph(step_of([1, 1]))
    assert fits_a_graph(step_of([1] * MOST_SEQUENCES))
    assert not fits_a_graph(step_of([1] * (MOST_SEQUENCES + 1)))
    assert not fits_a_graph(step_of([1, 2]))
    assert not fits_a_graph(step_of([1], scored=1))
    assert not fits_a_graph(step_of([]))


class Recording:
    """A `Graph` that repeats operations instead of launches."""

    made: int = 0
    replayed: int = 0

    def __init__(self) -> None:
        self._tape: list[Callable[[], None]] = []
        Recording.made += 1

    def record(self, run: Callable[[], Result]) -> Result:
        run()
        with _Tape(self._tape):
            result = run()
        for tensor in tree_leaves(result):
            tensor.fill_(float("nan"))
        return result

    def replay(self) -> None:
        Recording.replayed += 1
        for act in self._tape:
            act()


class _Tape(TorchDispatchMode):
    """Keeps every operation; one that made new tensors writes to the same ones when it is repeated."""

    current: _Tape | None = None

    def __init__(self, tape: list[Callable[[], None]]) -> None:
        super().__init__()
        self.tape = tape

    def __enter__(self) -> Any:
        _Tape.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _Tape.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))

        def again() -> None:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **(kwargs or {}))), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        if _Tape.current is self:
            self.tape.append(again)
        return made


class _Launcher:
    """A Triton kernel whose launches are kept while a tape runs; the interpreter's own operations are not."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            tape, _Tape.current = _Tape.current, None
            self._kernel[grid](*args, **kwargs)
            _Tape.current = tape
            if tape is not None:
                tape.tape.append(lambda: self._kernel[grid](*args, **kwargs))

        return launch


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, since the interpreter is slow."""
    directory = tmp_path_factory.mktemp("one-layer")
    sizes = {"hidden_size": 32, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 40}
    make_model(directory, num_hidden_layers=1, **sizes)
    return directory


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> Llama:
    return Llama(model_dir, SingleProcess(), torch.float32, CPU)


@pytest.fixture(scope="module")
def ladders(plain: Llama) -> list[RankLadder]:
    return random_ladders(plain.spec, 2, 32)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="kernels need the device's tensors; gpu_check compares real graphs")
@pytest.mark.parametrize(("compress", "graphs"), [(False, 3), (True, 4)])
def test_replayed_steps_equal_plain_ones(
    model_dir: Path,
    plain: Llama,
    ladders: list[RankLadder],
    compress: bool,
    graphs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the scenario, graphs of one size are replayed for other sequences, adapters, rungs and pages than they were
    recorded with, and with unused rows."""
    ops, paged = kernels("chunkwise_adapters.ops.triton"), kernels("chunkwise.model.paged_decode")
    for module, names in ((ops, ("shrink", "expand")), (paged, ("attend", "merge"))):
        for name in names:
            monkeypatch.setattr(module, name, _Launcher(getattr(module, name)))
    # Few programs, because the interpreter's time goes with their number.
    blocks = ops.Blocks(ranks=64, inputs=64, outputs=64, splits=1)
    monkeypatch.setattr(paged, "PagedDecode", partial(paged.PagedDecode, splits=2))
    monkeypatch.setattr(Recording, "made", 0)
    monkeypatch.setattr(Recording, "replayed", 0)
    recorded = Llama(model_dir, SingleProcess(), torch.float32, CPU, lora=ops.TritonLora(CPU, blocks))
    recorded._decoder = GraphDecoder(recorded._decoder, recorded.spec, Recording, blocks)
    expected = play(Session(plain, ladders, 32), compress=compress)
    got = play(Session(recorded, ladders, 32), compress=compress)
    assert compare(got, expected, 1e-4)["ok"]
    assert (Recording.made, Recording.replayed) == (graphs, 6)


def test_without_a_device_nothing_changes(plain: Llama) -> None:
    decoder = plain._decoder
    assert with_graphs(decoder, plain.spec, plain.group, plain.device) is decoder

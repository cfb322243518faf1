"""A step's table: tiles, gates and addresses of whatever segments, and what it keeps alive."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch

from chunkwise_adapters.format import LoraWeights
from chunkwise_adapters.gate import GatedSpan, build_segments
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.ops.table import Capacity, StepTable, describe, module_index, plan_step
from chunkwise_adapters.store import AdapterStore, ResidentAdapter
from gpu import DEVICE, kernels

KEY = (1, "down_proj")


@dataclass(frozen=True)
class FakeChunk:
    start: int
    rung: int | None
    scale: float = 1.0
    crossfade: int = 0


MakeAdapter = Callable[[str], ResidentAdapter]


@pytest.fixture
def make_adapter(make_weights: Callable[..., LoraWeights]) -> MakeAdapter:
    """Adapters of rank 16 on every module but layer 0's v_proj."""

    def make(name: str) -> ResidentAdapter:
        weights = make_weights(name, rank=16, seed=1)
        del weights.modules[0, "v_proj"]
        return AdapterStore(None, torch.float32, DEVICE).add(build_ladder(weights))

    return make


def test_entries_are_addresses_and_ranks(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter("a")
    entries, module = describe(adapter), adapter.modules[KEY]
    row = entries[module_index(KEY)].tolist()
    assert row == [module.a.data_ptr(), module.b_t.data_ptr(), *module.active_ranks]
    assert not entries[module_index((0, "v_proj"))].any()


def test_a_plan_cuts_segments_into_tiles_and_keeps_every_token_s_gate(make_adapter: MakeAdapter) -> None:
    a, b = make_adapter("a"), make_adapter("b")
    spans = [
        GatedSpan(0, 20, 0, a, (FakeChunk(0, 4, 0.5), FakeChunk(18, 8, 1.0, 1))),
        GatedSpan(20, 1, 9, b, ()),
        GatedSpan(30, 2, 9, a, (FakeChunk(0, 4),)),
    ]
    described: dict[ResidentAdapter, Any] = {}
    plan = plan_step(build_segments(spans, DEVICE), 16, described)
    assert set(described) == {a, b}
    four, eight, full = (a.rung_index(rung) for rung in (4, 8, None))
    # Segments: a up to rung 4 (18 + 2 tokens), a up to 8 (2 tokens), b.
    assert plan.tiles.tolist() == [[0, 16, 0, four], [16, 4, 0, four], [20, 2, 0, eight], [22, 1, 1, full]]
    assert plan.weights[:, 0].tolist() == [0.5] * 18 + [1.0] * 2 + [0.5, 1.0] + [1.0]
    assert plan.weights[:, 1].tolist() == [0.0] * 20 + [0.25, 0.0] + [0.0]
    assert plan.rungs[20].tolist() == [eight, four]
    assert plan.needs == Capacity(16, 4, 23, 16, 2, len(a.rungs), 14)
    table = StepTable(plan.needs, DEVICE)
    table.load(plan)
    assert table.rows.tolist() == [*range(18), 30, 31, 18, 19, 20]
    assert np.array_equal(table.factors[:, 1].cpu().numpy(), described[b])


def test_a_smaller_step_leaves_nothing_of_the_one_before(make_adapter: MakeAdapter) -> None:
    a, b = make_adapter("a"), make_adapter("b")
    described: dict[ResidentAdapter, Any] = {}
    both = plan_step(build_segments([GatedSpan(0, 20, 0, a, ()), GatedSpan(20, 1, 9, b, ())], DEVICE), 16, described)
    one = plan_step(build_segments([GatedSpan(3, 1, 9, b, ())], DEVICE), 16, described)
    table = StepTable(both.needs, DEVICE)
    table.load(both)
    table.load(one)
    assert table.tiles.tolist() == [[0, 1, 0, b.rung_index(None)], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert np.array_equal(table.factors[:, 0].cpu().numpy(), described[b])
    with pytest.raises(AssertionError, match="does not fit"):
        StepTable(one.needs, DEVICE).load(both)


def test_fitting_compares_every_size() -> None:
    capacity = Capacity(16, 4, 64, 32, 4, 8, 14)
    assert capacity.fits(Capacity(16, 1, 3, 32, 1, 8, 14))
    assert not capacity.fits(Capacity(64, 1, 3, 32, 1, 8, 14))
    for field in Capacity._fields[1:]:
        assert not capacity.fits(capacity._replace(**{field: getattr(capacity, field) + 1}))


def test_a_module_takes_two_launches_however_many_adapters(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = kernels("chunkwise_adapters.ops.triton")
    launches: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(ops, name)

        def __getitem__(self, grid: Any) -> Any:
            launches.append(self.name)
            return self.kernel[grid]

    for name in ("shrink", "expand"):
        monkeypatch.setattr(ops, name, Counted(name))
    spans = [GatedSpan(i, 1, 9, make_adapter(f"a{i}"), (FakeChunk(0, (4, 8)[i % 2]),)) for i in range(4)]
    op = ops.TritonLora(DEVICE, ops.Blocks(splits=1))
    op(torch.zeros(4, 48, device=DEVICE), torch.ones(4, 64, device=DEVICE), build_segments(spans, DEVICE), KEY)
    assert launches == ["shrink", "expand"]


def test_adapters_live_no_longer_than_the_step_after(make_adapter: MakeAdapter) -> None:
    ops = kernels("chunkwise_adapters.ops.triton")
    op, x, y = ops.TritonLora(DEVICE, ops.Blocks(splits=1)), torch.ones(1, 64, device=DEVICE), torch.zeros(1, 48)
    old, new = make_adapter("old"), make_adapter("new")
    gone = ref(old)
    op(y.to(DEVICE), x, build_segments([GatedSpan(0, 1, 9, old, ())], DEVICE), KEY)
    del old
    gc.collect()
    assert gone() is not None
    op(y.to(DEVICE), x, build_segments([GatedSpan(0, 1, 9, new, ())], DEVICE), KEY)
    gc.collect()
    assert gone() is None

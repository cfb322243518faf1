"""Shard plans tile the model at every world size, and what cannot work is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.core import UnsupportedModel
from chunkwise.model.parallel import plan_shard, split
from chunkwise.model.spec import ModelSpec

SMOLLM2 = ModelSpec(576, 30, 9, 3, 64, 1536, 49152, 8192, 1e-5, 1e5, None, True, False, False, "float32")


@given(st.integers(1, 500), st.integers(1, 40))
def test_split_tiles_evenly(total: int, parts: int) -> None:
    ranges = [split(total, parts, i) for i in range(parts)]
    assert [i for r in ranges for i in range(r.start, r.stop)] == list(range(total))
    sizes = [r.stop - r.start for r in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("world", range(1, 10))
@pytest.mark.parametrize(("heads", "kv"), [(9, 3), (8, 8), (8, 2), (12, 1)])
def test_every_query_head_is_computed_once_beside_its_kv_head(world: int, heads: int, kv: int) -> None:
    spec = replace(SMOLLM2, heads=heads, kv_heads=kv)
    try:
        plans = [plan_shard(spec, rank, world) for rank in range(world)]
    except UnsupportedModel:
        assert world > heads or (world > kv and -(-world // kv) > heads // kv)
        return
    assert [h for p in plans for h in range(p.heads.start, p.heads.stop)] == list(range(heads))
    assert {h for p in plans for h in range(p.kv_heads.start, p.kv_heads.stop)} == set(range(kv))
    for plan in plans:
        needed = {head // spec.group for head in range(plan.heads.start, plan.heads.stop)}
        assert needed == set(range(plan.kv_heads.start, plan.kv_heads.stop))
        assert plan.n_heads % plan.n_kv_heads == 0
    assert plans[0].heads.start == 0, "rank 0 reports the attention signal of head 0"


def test_smollm2_at_two_shards() -> None:
    first, second = (plan_shard(SMOLLM2, rank, 2) for rank in (0, 1))
    assert (first.n_heads, first.n_kv_heads) == (6, 2)
    assert (second.n_heads, second.n_kv_heads) == (3, 1)


@pytest.mark.parametrize("world", [10, 100])
def test_too_many_shards_are_refused_with_the_limit(world: int) -> None:
    with pytest.raises(UnsupportedModel, match="use at most 9 shards"):
        plan_shard(SMOLLM2, 0, world)

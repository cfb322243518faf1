from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.config.policy import RankPolicy
from chunkwise.core import AdapterInfo
from chunkwise.steering.ranks import RankChoice, RankSelector

ADAPTER = AdapterInfo(
    adapter_id="a",
    content_hash="h",
    trained_rank=32,
    rungs=(0, 2, 4, 8, 16, 32),
    kept_energy=(0.0, 0.25, 0.5, 0.75, 0.9, 1.0),
    mean_active_rank=(0.0, 2.0, 3.5, 7.0, 14.0, 30.0),
)


@st.composite
def adapters(draw: st.DrawFn) -> AdapterInfo:
    rungs = tuple(sorted(draw(st.sets(st.integers(0, 64), min_size=1, max_size=6))))
    energy = tuple(sorted(draw(st.lists(st.floats(0.0, 1.0), min_size=len(rungs), max_size=len(rungs)))))
    return AdapterInfo("a", "h", max(1, rungs[-1]), rungs, energy, tuple(float(rung) for rung in rungs))


POLICIES = st.builds(
    lambda low, more, skip, exponent: RankPolicy(
        min_rank=low, max_rank=None if more is None else low + more, skip_below=skip, energy_exponent=exponent
    ),
    st.integers(1, 80),
    st.none() | st.integers(0, 80),
    st.just(0.0) | st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)


@pytest.mark.parametrize(
    ("complexity", "rung"), [(0.0, 2), (0.01, 4), (0.25, 4), (0.26, 8), (0.5, 8), (0.75, 16), (0.751, 32), (1.0, 32)]
)
def test_wanted_rank_runs_geometrically_and_rounds_up_to_a_rung(complexity: float, rung: int) -> None:
    assert RankSelector(RankPolicy(min_rank=2), ADAPTER).select(complexity).rung == rung


@given(adapters(), POLICIES, st.floats(0.0, 1.0))
def test_choice_is_the_smallest_rung_that_reaches_the_wanted_rank(
    adapter: AdapterInfo, policy: RankPolicy, complexity: float
) -> None:
    low = min(policy.min_rank, adapter.trained_rank)
    high = min(policy.max_rank or adapter.trained_rank, adapter.trained_rank)
    wanted = math.exp((1.0 - complexity) * math.log(low) + complexity * math.log(high))
    choice = RankSelector(policy, adapter).select(complexity)
    reaching = [rung for rung in adapter.rungs if rung >= wanted - 1e-9]
    exceeding = [rung for rung in adapter.rungs if rung > wanted + 1e-9]
    if complexity < policy.skip_below and adapter.rungs[0] == 0:
        assert choice.rung == 0
    else:
        assert choice.rung in {min(reaching, default=adapter.rungs[-1]), min(exceeding, default=adapter.rungs[-1])}
    assert choice.active_rank == float(choice.rung or 0)


@given(adapters(), POLICIES, st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6))
def test_rung_never_falls_when_complexity_rises(
    adapter: AdapterInfo, policy: RankPolicy, complexities: list[float]
) -> None:
    selector = RankSelector(policy, adapter)
    rungs = [selector.select(complexity).rung or 0 for complexity in sorted(complexities)]
    assert rungs == sorted(rungs)


@pytest.mark.parametrize("bound", [2, 4, 8, 16, 32])
def test_an_upper_bound_that_is_a_rung_is_never_passed(bound: int) -> None:
    for low in range(1, bound + 1):
        selector = RankSelector(RankPolicy(min_rank=low, max_rank=bound), ADAPTER)
        assert selector.select(1.0).rung == bound


def test_bounds_beyond_the_trained_rank_are_cut_to_it() -> None:
    selector = RankSelector(RankPolicy(min_rank=64, max_rank=128), ADAPTER)
    assert {selector.select(complexity).rung for complexity in (0.0, 0.5, 1.0)} == {32}


def test_scale_makes_up_for_the_dropped_energy() -> None:
    policy = RankPolicy(min_rank=2, energy_exponent=1.0)
    assert RankSelector(policy, ADAPTER).select(0.0) == RankChoice(2, 2.0, 2.0)
    half = RankSelector(replace(policy, energy_exponent=0.5), ADAPTER).select(0.0)
    assert half.scale == pytest.approx(math.sqrt(2.0))
    assert RankSelector(policy, ADAPTER).select(1.0).scale == 1.0


def test_scale_is_exactly_one_at_exponent_zero_and_where_nothing_is_kept() -> None:
    plain = RankSelector(RankPolicy(min_rank=1, energy_exponent=0.0), ADAPTER)
    assert {plain.select(step / 10).scale for step in range(11)} == {1.0}
    skipping = replace(ADAPTER, rungs=(0,), kept_energy=(0.0,), mean_active_rank=(0.0,))
    assert RankSelector(RankPolicy(energy_exponent=1.0), skipping).select(1.0) == RankChoice(0, 0.0, 1.0)


@pytest.mark.parametrize(
    "malformed",
    [
        replace(ADAPTER, rungs=(), kept_energy=(), mean_active_rank=()),
        replace(ADAPTER, kept_energy=(1.0,)),
        replace(ADAPTER, mean_active_rank=(1.0,)),
    ],
)
def test_malformed_rungs_are_refused(malformed: AdapterInfo) -> None:
    with pytest.raises(ValueError, match="at least one rung"):
        RankSelector(RankPolicy(), malformed)


def test_below_skip_below_the_adapter_is_skipped_where_its_ladder_allows() -> None:
    info = AdapterInfo("a", "hash", 8, (0, 2, 8), (0.0, 0.6, 1.0), (0.0, 2.0, 8.0))
    selector = RankSelector(RankPolicy(min_rank=2, skip_below=0.3), info)
    assert [selector.select(c).rung for c in (0.0, 0.29, 0.3, 1.0)] == [0, 0, 8, 8]
    without = AdapterInfo("a", "hash", 8, (2, 8), (0.6, 1.0), (2.0, 8.0))
    assert RankSelector(RankPolicy(skip_below=0.3), without).select(0.0).rung == 2

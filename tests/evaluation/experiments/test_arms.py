"""Ladders of equal cost, bytes of cut factors, and the policies that are varied."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chunkwise.config.adapter_policy import AdapterPolicy
from chunkwise.config.policy import RankPolicy, SteeringPolicy
from chunkwise.evaluation.experiments.ablation import SIGNALS, variants
from chunkwise.evaluation.experiments.arms import (
    all_ladders,
    factor_bytes,
    matched_ladder,
    varied_policy,
)
from chunkwise.evaluation.experiments.crossfade import WINDOWS, with_window
from chunkwise.model.spec import load_spec
from chunkwise_adapters.format import LoraWeights, load_adapter
from chunkwise_adapters.ladder import build_ladder
from conftest import TinyWorld

CALIBRATED = AdapterPolicy("hash", (0, 1), (0.0, 1.0), answer_rung=1, prompt_rung=0)


@pytest.fixture(scope="module")
def weights(tiny: TinyWorld) -> LoraWeights:
    return load_adapter(tiny.adapters["a16"], "a16", load_spec(tiny.model).target_shapes())


@pytest.mark.parametrize("rank", [0.0, 0.3, 1.0, 2.71, 15.5, 16.0])
def test_a_matched_ladder_costs_what_it_is_to_match(weights: LoraWeights, rank: float) -> None:
    ladder = matched_ladder(weights, build_ladder(weights, allocation="global"), rank)
    # One rank more in one module changes the mean by up to its share of the modules' sizes.
    sizes = [module.a.shape[1] + module.b_t.shape[1] for module in ladder.modules.values()]
    assert abs(ladder.mean_active_rank[0] - rank) <= max(sizes) / sum(sizes)
    assert len(ladder.rungs) <= 2 and ladder.rungs[-1] == 16


def test_bytes_of_factors_are_those_of_their_cut_rows(weights: LoraWeights) -> None:
    ladder = build_ladder(weights)
    for rung, taken in zip(ladder.rungs, factor_bytes(ladder), strict=True):
        cut = int(rung)
        assert taken == sum(m.a[:cut].nbytes + m.b_t[:cut].nbytes for m in ladder.modules.values())


def test_ladders_have_the_kinds_and_the_rungs_that_they_are_named_after(weights: LoraWeights) -> None:
    ladders = all_ladders(weights, build_ladder(weights), build_ladder(weights))
    assert list(ladders) == ["plain", "plain+global", "whitened", "whitened+global", "sensitive"]
    assert [ladder.allocation for ladder in ladders.values()] == ["uniform", "global", "uniform", "global", "global"]
    assert ladders["plain"].rungs == (0, 1, 2, 4, 8, 16)
    assert ladders["whitened+global"].rungs == (0, 0.25, 0.5, 1, 2, 4, 8, 16)
    assert len({ladder.name for ladder in ladders.values()}) == 5


def test_ablation_leaves_signals_out_and_everything_else_alone() -> None:
    policy = SteeringPolicy(adapters={"mine": CALIBRATED})
    policy = replace(
        policy, estimator=replace(policy.estimator, attention=replace(policy.estimator.attention, weight=0))
    )
    arms = variants(policy)
    assert list(arms) == [
        "all",
        *(f"{name} alone" for name in SIGNALS),
        *(f"without {name}" for name in SIGNALS if name != "attention"),
    ]

    def weights(arm: str) -> list[float]:
        return [getattr(arms[arm].estimator, name).weight for name in SIGNALS]

    assert weights("all") == [1.0, 0.5, 0.0, 0.5]
    assert weights("novelty alone") == [0.0, 0.5, 0.0, 0.0]
    assert weights("attention alone") == [0.0, 0.0, 1.0, 0.0]
    assert weights("without position") == [1.0, 0.5, 0.0, 0.0]
    for variant in arms.values():
        assert replace(variant, estimator=policy.estimator) == replace(
            policy, rank=RankPolicy(source="complexity"), adapters={}
        )


def test_the_policy_that_is_varied_is_the_first_that_steers_the_adapter() -> None:
    general, special = SteeringPolicy(), SteeringPolicy(adapters={"mine": CALIBRATED})
    assert varied_policy([special, general], "mine") is special
    assert varied_policy([special, general], "other") is general
    made = varied_policy([special], "other")
    assert made.rank.source == "complexity" and made.rank.min_rank < (made.rank.max_rank or 0)


def test_all_windows_fit_the_shortest_chunk() -> None:
    for window in WINDOWS:
        policy = with_window(SteeringPolicy(), window)
        assert policy.rank.crossfade == window
        assert policy.chunker.min_length >= max(WINDOWS)
        assert policy.chunker == with_window(SteeringPolicy(), 0).chunker

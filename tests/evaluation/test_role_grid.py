from __future__ import annotations

import math

import pytest

from chunkwise.config.policy import RankPolicy, SteeringPolicy
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.nll import Passage, evaluate_nll
from chunkwise.evaluation.role_grid import RoleGrid
from conftest import TinyWorld
from evaluation.worlds import evaluator

PASSAGES = [
    Passage("one", tuple(b"It was a bright cold day in April."), 25),
    Passage("two", tuple(b"The clocks were striking thirteen."), 30),
]


@pytest.fixture
def grid(tiny: TinyWorld) -> RoleGrid:
    stack = evaluator(tiny)
    return RoleGrid(stack, stack.adapters["a4"], PASSAGES, lambda: None)


def test_a_pair_is_measured_once_as_it_is_served(tiny: TinyWorld, grid: RoleGrid) -> None:
    pair = grid.measure(1, 4)
    assert grid.measure(1, 4) is pair and grid.tried == [pair]
    mode = SteeringMode("roles", "a4", SteeringPolicy(rank=RankPolicy(prompt_rung=1, answer_rung=4)))
    scores = evaluate_nll(evaluator(tiny), PASSAGES, mode, "decode")
    assert pair.nll == pytest.approx(sum(sum(s.nll) for s in scores) / sum(len(s.nll) for s in scores))
    # Uniform ranks: what a rung costs is the rung.
    ranks = [rank for score in scores for rank in score.trace.ranks()]
    assert pair.mean_rank == pytest.approx(sum(ranks) / len(ranks))
    assert ranks.count(4.0) == sum(len(p.ids) - p.first for p in PASSAGES)


def test_the_best_pair_within_a_mean_rank_spends_it(grid: RoleGrid) -> None:
    best = grid.within_rank(2.0)
    assert all(pair.mean_rank <= 2.0 and pair.prompt_rung <= pair.answer_rung for pair in grid.tried)
    assert [pair.answer_rung for pair in grid.tried] == [0, 1, 2, 4]
    assert grid.tried[-1].prompt_rung == 1
    assert best.nll == min(pair.nll for pair in grid.tried)
    assert grid.within_rank(0.0).mean_rank == 0.0


def test_a_cheap_pair_within_a_loss(grid: RoleGrid) -> None:
    full = grid.measure(4, 4)
    cheap = grid.within_loss(0.05)
    assert cheap.nll <= full.nll + 0.05
    assert cheap.mean_rank <= full.mean_rank
    assert grid.within_loss(math.inf).mean_rank == 0.0

"""Areas, losses and means on records whose numbers are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest

from chunkwise.config.eval_settings import EngineChoice, EvalSettings, Selection, TaskSettings
from chunkwise.evaluation.bootstrap import Metric, exp_ratio, ratio
from chunkwise.evaluation.experiments.figures import (
    Point,
    area_difference,
    aurac,
    curve_area,
    difference,
    loss_against_full,
    mean_ranks,
    smallest_enough,
    value,
)
from chunkwise.evaluation.experiments.measures import Measure, Reading


class NllTask:
    """Only the metrics are asked for."""

    jobs = ()
    metrics: ClassVar[dict[str, Metric]] = {"nll_per_token": ratio, "perplexity": exp_ratio, "score": ratio}
    identity: ClassVar[dict[str, Any]] = {}

    def grade(self, outcome: Any) -> Any:
        raise AssertionError("nothing is run")


LOSS = Reading("nll_per_token", "perplexity", lower_is_better=True)
SCORE = Reading("score", "score", lower_is_better=False)


@pytest.fixture
def measure() -> Measure:
    task = TaskSettings("nll", Path("x"), 512, 512, "decode", "fra", 1)
    return Measure("answers", EvalSettings(EngineChoice("m"), task, Selection(), "", Path("o")), NllTask(), (LOSS,))


def records(sums: list[float], rank: float = 0.0, tokens: tuple[int, int] = (4, 1)) -> list[dict[str, Any]]:
    """One item per sum of NLL, each over two scored tokens."""
    return [
        {
            "statistics": {metric: [total, 2.0] for metric in NllTask.metrics},
            "tokens": list(tokens),
            "rank_sums": [rank * count for count in tokens],
        }
        for total in sums
    ]


def test_area_of_a_straight_line_and_of_a_step() -> None:
    """Over log2(1 + rank) the points 0, 1, 3 and 7 lie at 0, 1, 2 and 3."""
    ranks = [0, 1, 3, 7]
    assert aurac(ranks, [9.0, 6.0, 3.0, 0.0]) == pytest.approx(0.5)
    assert aurac(ranks, [0.0, 1.0, 1.0, 1.0]) == pytest.approx((0.5 + 1 + 1) / 3)
    assert aurac(ranks, [0.0, 0.0, 0.0, 1.0]) == pytest.approx(0.5 / 3)
    # More than full rank gives counts as more, and less than the base model as less.
    assert aurac(ranks, [0.0, 2.0, 1.0, 1.0]) == pytest.approx((1 + 1.5 + 1) / 3)


def test_an_area_may_start_between_two_points() -> None:
    ranks = [0, 1, 3, 7]
    assert aurac(ranks, [0.0, 2.0, 1.0, 1.0], start=1) == pytest.approx((1.5 + 1) / 2)
    # Halfway from 1 to 2 on the axis the curve is at 1.5.
    assert aurac(ranks, [0.0, 2.0, 1.0, 1.0], start=2**1.5 - 1) == pytest.approx((1.25 * 0.5 + 1) / 1.5)
    assert aurac(ranks, [0.0, 2.0, 1.0, 1.0], start=0) == aurac(ranks, [0.0, 2.0, 1.0, 1.0])


def test_area_knows_neither_unit_nor_sign_and_needs_a_gain() -> None:
    ranks, qualities = [0.0, 0.25, 2.5, 16.0], [3.0, 5.0, 8.0, 9.0]
    assert aurac(ranks, [-7.0 * q + 1.0 for q in qualities]) == pytest.approx(aurac(ranks, qualities))
    assert math.isnan(aurac(ranks, [1.0, 2.0, 3.0, 1.0]))


def test_a_curve_has_the_area_of_its_values_at_executed_ranks(measure: Measure) -> None:
    curve = [Point(0, records([8.0, 4.0])), Point(9, records([2.0, 4.0], 1.0)), Point(16, records([0.0, 4.0], 3.0))]
    area = curve_area(measure, curve, "nll_per_token")
    assert area.value == pytest.approx(aurac([0, 1, 3], [12 / 4, 6 / 4, 4 / 4]))
    # A resample with the second item alone gains nothing; all others have the first item's shares.
    assert area.low == pytest.approx(area.high) == pytest.approx(area.value)
    other = [curve[0], Point(9, records([8.0, 4.0], 1.0)), curve[2]]
    more = area_difference(measure, curve, other, "nll_per_token")
    assert more.value == pytest.approx(area.value - aurac([0, 1, 3], [3.0, 3.0, 1.0]))
    assert 0 < more.low <= more.value <= more.high


def test_mean_ranks_weigh_items_by_their_tokens() -> None:
    both = [*records([0.0], 2.0, (4, 1)), *records([0.0], 8.0, (14, 1))]
    ranks = mean_ranks(both)
    assert ranks.all == pytest.approx((5 * 2 + 15 * 8) / 20)
    assert ranks.prompt == pytest.approx((4 * 2 + 14 * 8) / 18)
    assert ranks.answer == 5.0
    assert math.isnan(mean_ranks(records([0.0], 2.0, (4, 0))).answer)


def test_values_and_paired_differences(measure: Measure) -> None:
    first, second = records([1.0, 5.0, 3.0]), records([2.0, 6.0, 4.0])
    assert value(measure, first, "nll_per_token").value == pytest.approx(1.5)
    paired = difference(measure, first, second, "nll_per_token")
    # Every item gains half a nat a token, whatever is drawn.
    assert (paired.value, paired.low, paired.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_losses_are_shares_of_full_rank_and_positive_for_worse(measure: Measure) -> None:
    full, rung = Point(16, records([2.0, 2.0])), Point(1, records([2.2, 2.2]))
    assert loss_against_full(measure, rung, full, LOSS).value == pytest.approx(math.exp(0.1) - 1)
    assert loss_against_full(measure, rung, full, SCORE).value == pytest.approx(-0.1)
    assert loss_against_full(measure, full, full, LOSS).high == 0.0


@pytest.mark.parametrize(
    ("losses", "index"),
    [
        ([0.5, 0.02, 0.01, 0.0], 2),
        ([0.5, 0.005, 0.02, 0.0], 3),
        ([-0.1, -0.2, 0.0], 0),
        ([0.5, math.nan, 0.0], 2),
    ],
)
def test_a_rung_is_enough_only_if_all_above_it_are(losses: list[float], index: int) -> None:
    assert smallest_enough(losses) == index

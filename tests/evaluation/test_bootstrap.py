from __future__ import annotations

import math

import numpy as np
import pytest

from chunkwise.evaluation.bootstrap import exp_ratio, interval, paired_difference, ratio


def items(seed: int, mean: float, count: int = 200) -> list[list[float]]:
    return [[value, 1.0] for value in np.random.default_rng(seed).normal(mean, 1.0, count)]


def test_the_interval_is_about_two_standard_errors_wide_and_seeded() -> None:
    got = interval(items(0, 5.0), ratio, seed=1)
    assert got.value == pytest.approx(np.mean([value for value, _ in items(0, 5.0)]))
    assert got.low < got.value < got.high
    assert got.high - got.low == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.25)
    assert got == interval(items(0, 5.0), ratio, seed=1)
    assert got != interval(items(0, 5.0), ratio, seed=2)


def test_it_covers_the_truth_about_nineteen_times_in_twenty() -> None:
    """With 100 trials fewer than 85 hits have a probability below 0.001 if the coverage is 94 %."""
    hits = sum(
        got.low <= 2.0 <= got.high for got in (interval(items(seed, 2.0, 60), ratio, seed=7) for seed in range(100))
    )
    assert hits >= 85


def test_pairing_cancels_what_items_share() -> None:
    hard = np.random.default_rng(3).normal(0.0, 50.0, 100)
    first, second = [[h + 1.0, 1.0] for h in hard], [[h, 1.0] for h in hard]
    difference = paired_difference(first, second, ratio, seed=0)
    assert (difference.value, difference.low, difference.high) == pytest.approx((1.0, 1.0, 1.0))
    assert interval(first, ratio, 0).low < interval(second, ratio, 0).high


def test_ratios_weigh_items_by_their_tokens() -> None:
    assert interval([[10.0, 1.0], [2.0, 5.0]], ratio, 0).value == 2.0
    assert interval([[6.0, 3.0]], exp_ratio, 0).value == pytest.approx(math.exp(2.0))


def test_a_metric_undefined_on_all_resamples_has_no_interval() -> None:
    got = interval([[0.0, 0.0], [0.0, 0.0]], ratio, 0)
    assert all(math.isnan(value) for value in (got.value, got.low, got.high))


def test_resamples_that_leave_a_metric_undefined_are_left_out() -> None:
    got = interval([[1.0, 1.0], [0.0, 0.0]], ratio, 0)
    assert (got.value, got.low, got.high) == (1.0, 1.0, 1.0)

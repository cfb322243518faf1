from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.config.policy import EstimatorPolicy, SignalPolicy
from chunkwise.steering.estimator import ComplexityEstimator, Observation

OFF = SignalPolicy(weight=0.0, mean=0.0, std=1.0)
ENTROPY_ONLY = EstimatorPolicy(
    entropy=SignalPolicy(weight=2.0, mean=0.2, std=0.1),
    novelty=OFF,
    attention=OFF,
    position=OFF,
    inertia=8.0,
    clip=3.0,
    gain=1.5,
)
UNIT = st.floats(0.0, 1.0)
OBSERVATIONS = st.builds(
    Observation, st.none() | UNIT, st.none() | UNIT, st.none() | UNIT, st.none() | UNIT | st.just(math.nan)
)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@given(st.lists(UNIT, min_size=1, max_size=50))
def test_normalisation_is_that_of_the_prior_tokens_and_the_past_taken_together(values: list[float]) -> None:
    estimator = ComplexityEstimator(ENTROPY_ONLY)
    estimates = [estimator.estimate(Observation(entropy=value)) for value in values]
    # Four tokens at mean - std and four at mean + std have the starting mean and std, and weigh `inertia` = 8.
    past = [0.1, 0.3] * 4
    for value, estimate in zip(values, estimates, strict=True):
        score = float(np.clip((value - np.mean(past)) / np.std(past), -3.0, 3.0))
        assert estimate == pytest.approx(sigmoid(1.5 * score), abs=1e-9)
        past.append(value)


def test_first_token_is_judged_by_the_policys_scale_with_weights_over_the_signals_present() -> None:
    policy = EstimatorPolicy(
        entropy=SignalPolicy(weight=1.0, mean=0.2, std=0.1),
        novelty=SignalPolicy(weight=-0.5, mean=0.5, std=0.25),
        attention=SignalPolicy(weight=4.0, mean=0.5, std=0.5),
        position=OFF,
        gain=2.0,
    )
    seen = Observation(entropy=0.3, novelty=1.0, position=1.0)
    expected = sigmoid(2.0 * (1.0 * 1.0 - 0.5 * 2.0) / 1.5)
    assert ComplexityEstimator(policy).estimate(seen) == pytest.approx(expected)
    expected = sigmoid(2.0 * (1.0 * 1.0 - 0.5 * 2.0 + 4.0 * -1.0) / 5.5)
    assert ComplexityEstimator(policy).estimate(replace(seen, attention=0.0)) == pytest.approx(expected)


@given(st.lists(OBSERVATIONS, max_size=40))
def test_complexity_stays_in_the_unit_interval_and_repeats(observations: list[Observation]) -> None:
    first, second = ComplexityEstimator(EstimatorPolicy()), ComplexityEstimator(EstimatorPolicy())
    estimates = [first.estimate(observation) for observation in observations]
    assert all(0.0 <= estimate <= 1.0 for estimate in estimates)
    assert estimates == [second.estimate(observation) for observation in observations]


@given(st.lists(OBSERVATIONS, max_size=40))
def test_a_signal_of_weight_zero_is_as_good_as_missing(observations: list[Observation]) -> None:
    without = ComplexityEstimator(replace(EstimatorPolicy(), novelty=OFF))
    reference = ComplexityEstimator(EstimatorPolicy())
    for observation in observations:
        assert without.estimate(observation) == reference.estimate(replace(observation, novelty=None))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_no_trace(value: float) -> None:
    hit, spared = ComplexityEstimator(ENTROPY_ONLY), ComplexityEstimator(ENTROPY_ONLY)
    assert hit.estimate(Observation(entropy=value)) == 0.5
    assert hit.estimate(Observation(entropy=0.4)) == spared.estimate(Observation(entropy=0.4))


def test_without_any_signal_complexity_is_neutral() -> None:
    assert ComplexityEstimator(EstimatorPolicy()).estimate(Observation()) == 0.5


def test_a_constant_signal_becomes_neutral_in_the_end() -> None:
    estimator = ComplexityEstimator(ENTROPY_ONLY)
    estimates = [estimator.estimate(Observation(entropy=0.9)) for _ in range(20_000)]
    assert estimates[0] > 0.95
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[-1] == pytest.approx(0.5, abs=0.02)

"""Complexity of a token from whatever signals are known of it. Knows neither chunks nor ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from chunkwise.config.policy import EstimatorPolicy, SignalPolicy


@dataclass(frozen=True, slots=True)
class Observation:
    """The signals known of one token, each in its own unit; None: not known here."""

    entropy: float | None = None
    novelty: float | None = None
    attention: float | None = None
    position: float | None = None


class _RunningSignal:
    """One signal, normalised by the mean and variance of its own past.

    The policy's mean and std stand for ``inertia`` tokens seen before the first (Welford's recurrence started from that
    count), so early tokens are judged by the calibrated scale and later ones more and more by their own sequence. The
    std never reaches 0, because the starting variance is never forgotten entirely.
    """

    def __init__(self, signal: SignalPolicy, inertia: float, clip: float) -> None:
        self.weight = signal.weight
        self._clip = clip
        self._count = inertia
        self._mean = signal.mean
        self._squares = inertia * signal.std**2

    def normalise(self, value: float) -> float:
        """z-score of ``value`` against the past, clipped to ± ``clip``; then ``value`` joins the past."""
        distance = value - self._mean
        score = distance / math.sqrt(self._squares / self._count)
        self._count += 1.0
        self._mean += distance / self._count
        self._squares += distance * (value - self._mean)
        return min(max(score, -self._clip), self._clip)


class ComplexityEstimator:
    """Complexity of one sequence's tokens: ``c = sigmoid(gain · Σ w_i z_i / Σ |w_i|)`` over the signals present.

    ``z_i`` is the running-normalised signal. A signal that is missing, not finite, or of weight 0 drops out of both
    sums; with none left, c is 0.5.
    """

    def __init__(self, policy: EstimatorPolicy) -> None:
        self._gain = policy.gain
        self._entropy, self._novelty, self._attention, self._position = (
            _RunningSignal(signal, policy.inertia, policy.clip)
            for signal in (policy.entropy, policy.novelty, policy.attention, policy.position)
        )

    def estimate(self, observation: Observation) -> float:
        """Complexity of the sequence's next observation, in [0, 1]; its signals then count in the normalisation."""
        total = 0.0
        weights = 0.0
        for signal, value in (
            (self._entropy, observation.entropy),
            (self._novelty, observation.novelty),
            (self._attention, observation.attention),
            (self._position, observation.position),
        ):
            if value is None or signal.weight == 0.0 or not math.isfinite(value):
                continue
            total += signal.weight * signal.normalise(value)
            weights += abs(signal.weight)
        score = total / weights if weights > 0.0 else 0.0
        return 0.5 + 0.5 * math.tanh(0.5 * self._gain * score)

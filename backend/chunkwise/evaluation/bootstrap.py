"""Bootstrap intervals of metrics that are functions of sums over items (means, ratios of totals, corpus BLEU).

Items are drawn with replacement, not tokens, because the tokens of one item depend on each other. Percentile intervals
(Efron, 1979); the seed fixes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A metric of the summed statistics; NaN where the sums leave it undefined.
Metric = Callable[[NDArray[np.float64]], float]

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """A metric over all items, and the bounds of its 95 % bootstrap interval. NaN where undefined."""

    value: float
    low: float
    high: float


def ratio(sums: NDArray[np.float64]) -> float:
    """The first sum over the second, a mean if the second counts."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def exp_ratio(sums: NDArray[np.float64]) -> float:
    """e to the power of `ratio`: perplexity from summed NLL and the number of tokens."""
    return math.exp(ratio(sums))


def interval(statistics: Sequence[Sequence[float]], metric: Metric, seed: int) -> Interval:
    """``metric`` over ``statistics`` [items, k], at least one item, and its interval."""
    table = np.asarray(statistics, dtype=np.float64)
    items = len(table)
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(RESAMPLES):
        counts = np.bincount(draw.integers(0, items, items), minlength=items)
        values.append(metric(counts @ table))
    defined = [value for value in values if not math.isnan(value)]
    low, high = np.percentile(defined, (2.5, 97.5)) if defined else (math.nan, math.nan)
    return Interval(metric(table.sum(axis=0)), float(low), float(high))


def paired_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], metric: Metric, seed: int
) -> Interval:
    """Metric of ``first`` less that of ``second``, both of the same items in the same order. Each resample takes the
    same items from both, so what makes items differ cancels; an interval without 0 is a difference."""
    width = len(first[0])
    both = [[*a, *b] for a, b in zip(first, second, strict=True)]
    return interval(both, lambda sums: metric(sums[:width]) - metric(sums[width:]), seed)

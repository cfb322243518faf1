"""Numbers read off the records of runs: values, paired differences, mean ranks, and areas under rank-quality curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chunkwise.evaluation.bootstrap import Interval, Metric, interval, paired_difference
from chunkwise.evaluation.experiments.measures import Measure, Reading
from chunkwise.evaluation.results import Record

_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class MeanRanks:
    """Mean active rank over all computed positions, those of the prompts, and those behind them (NaN: none)."""

    all: float
    prompt: float
    answer: float


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a rank-quality curve: the rung's name in numbers, and the records that it gave."""

    rung: float
    records: Sequence[Record]

    @property
    def rank(self) -> float:
        """The mean active rank, as executed."""
        return mean_ranks(self.records).all


def mean_ranks(records: Sequence[Record]) -> MeanRanks:
    """Of all items together, as executed."""
    sums = [sum(record["rank_sums"][part] for record in records) for part in (0, 1)]
    counts = [sum(record["tokens"][part] for record in records) for part in (0, 1)]
    prompt, answer = (sums[part] / counts[part] if counts[part] else math.nan for part in (0, 1))
    return MeanRanks(sum(sums) / sum(counts), prompt, answer)


def value(measure: Measure, records: Sequence[Record], metric: str) -> Interval:
    """A metric of a run with its bootstrap interval."""
    return interval(_statistics(records, metric), measure.task.metrics[metric], measure.settings.selection.seed)


def difference(measure: Measure, first: Sequence[Record], second: Sequence[Record], metric: str) -> Interval:
    """The metric of ``first`` less that of ``second``, runs of the same items, with its paired interval."""
    pairs = _statistics(first, metric), _statistics(second, metric)
    return paired_difference(*pairs, measure.task.metrics[metric], measure.settings.selection.seed)


def aurac(ranks: Sequence[float], qualities: Sequence[float], start: float = 0.0) -> float:
    """Area under the rank-quality curve: the mean over ``log2(1 + rank)`` of the share of the adapter's gain that a
    rank gives, ``(q_k - q_0) / (q_full - q_0)``, by trapezoids from the first point (the base model) to the last (full
    rank). 0: nothing before full rank; 1: all of it from the first step on. NaN where full rank gains nothing.

    The paper's name for it leaves the axis open. On a linear one the upper half of the ranks, where curves are flat,
    would be half of the area; on this one every doubling counts alike, and rank 0 is finite. The sign of a metric, and
    its unit, cancel, so that areas of different metrics can be compared. With ``start`` the mean is over the ranks from
    there on.
    """
    gain = qualities[-1] - qualities[0]
    if gain == 0.0:
        return math.nan
    shares = (np.asarray(qualities) - qualities[0]) / gain
    axis = np.log2(1.0 + np.asarray(ranks))
    first = np.log2(1.0 + start)
    shares = np.concatenate(([np.interp(first, axis, shares)], shares[axis > first]))
    axis = np.concatenate(([first], axis[axis > first]))
    return float(np.sum(np.diff(axis) * (shares[1:] + shares[:-1]) / 2) / (axis[-1] - axis[0]))


def curve_area(measure: Measure, curve: Sequence[Point], metric: str) -> Interval:
    """`aurac` of a curve from the base model to full rank, with its bootstrap interval: a resample takes the same items
    at all rungs."""
    area = _area_of_sums(measure, curve, metric)
    return interval(_stacked(curve, metric), area, measure.settings.selection.seed)


def area_difference(
    measure: Measure, first: Sequence[Point], second: Sequence[Point], metric: str, start: float = 0.0
) -> Interval:
    """The area of ``first`` less that of ``second`` from the rank ``start`` on, of the same items, with its paired
    interval."""
    areas = [_area_of_sums(measure, curve, metric, start) for curve in (first, second)]
    tables = [_stacked(curve, metric) for curve in (first, second)]
    width = len(tables[0][0])
    both = [[*a, *b] for a, b in zip(*tables, strict=True)]
    return interval(both, lambda sums: areas[0](sums[:width]) - areas[1](sums[width:]), measure.settings.selection.seed)


def loss_against_full(measure: Measure, point: Point, full: Point, reading: Reading) -> Interval:
    """How much worse a rung is than full rank, as a share of full rank's metric; positive is worse."""
    metric = measure.task.metrics[reading.tolerance_metric]
    sign = 1.0 if reading.lower_is_better else -1.0
    tables = [_statistics(p.records, reading.tolerance_metric) for p in (point, full)]
    width = len(tables[0][0])

    def loss(sums: NDArray[np.float64]) -> float:
        reference = metric(sums[width:])
        return sign * (metric(sums[:width]) / reference - 1.0) if reference else math.nan

    both = [[*a, *b] for a, b in zip(*tables, strict=True)]
    return interval(both, loss, measure.settings.selection.seed)


def smallest_enough(losses: Sequence[float]) -> int:
    """Index of the first of the ascending rungs from which on every rung loses at most 1 %; the last is full rank,
    which loses nothing."""
    worse = [index for index, loss in enumerate(losses) if not loss <= _TOLERANCE]
    return min(worse[-1] + 1, len(losses) - 1) if worse else 0


def _statistics(records: Sequence[Record], metric: str) -> list[list[float]]:
    return [record["statistics"][metric] for record in records]


def _stacked(curve: Sequence[Point], metric: str) -> list[list[float]]:
    """Per item, its statistics at all points one behind the other."""
    columns = [_statistics(point.records, metric) for point in curve]
    return [[number for statistics in row for number in statistics] for row in zip(*columns, strict=True)]


def _area_of_sums(measure: Measure, curve: Sequence[Point], name: str, start: float = 0.0) -> Metric:
    metric = measure.task.metrics[name]
    ranks = [point.rank for point in curve]

    def area(sums: NDArray[np.float64]) -> float:
        parts = np.split(sums, len(ranks))
        return aurac(ranks, [metric(part) for part in parts], start)

    return area

"""The tables and the plot of quality against rank, from runs that are done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chunkwise.evaluation.bootstrap import Interval
from chunkwise.evaluation.experiments import figures
from chunkwise.evaluation.experiments.arms import factor_bytes
from chunkwise.evaluation.experiments.figures import Point
from chunkwise.evaluation.experiments.measures import Measure, Reading
from chunkwise.evaluation.experiments.report import Panel, Report, Series
from chunkwise.evaluation.experiments.tables import Cell, Table
from chunkwise.evaluation.results import Record
from chunkwise_adapters.ladder import RankLadder

_HEAD = ("adapter", "task", "metric")
_PERPLEXITY = "perplexity"


@dataclass(frozen=True, slots=True)
class Steered:
    """A policy's run, and that of the fixed rung of the same executed mean rank."""

    name: str
    records: Sequence[Record]
    fixed: Point

    @property
    def point(self) -> Point:
        """The run as a point of a curve."""
        rank = figures.mean_ranks(self.records).all
        return Point(rank, self.records)


@dataclass(frozen=True, slots=True)
class Measured:
    """All runs of one measure on one adapter: per ladder its curve from the base model to full rank, and the policies.
    ``ladders`` has the same names as ``curves``."""

    adapter: str
    measure: Measure
    ladders: Mapping[str, RankLadder]
    curves: Mapping[str, Sequence[Point]]
    steered: Sequence[Steered]


@dataclass(frozen=True, slots=True)
class _Read:
    """One number of a measure."""

    measured: Measured
    reading: Reading

    @property
    def head(self) -> tuple[Cell, ...]:
        return self.measured.adapter, self.measured.measure.name, self.reading.metric

    @property
    def title(self) -> str:
        return f"{self.measured.adapter}, {self.measured.measure.name}: {self.reading.metric}"

    def value(self, records: Sequence[Record]) -> Interval:
        return figures.value(self.measured.measure, records, self.reading.metric)

    def perplexity(self, records: Sequence[Record]) -> Interval | None:
        """Beside NLL, the form in which it is usually quoted."""
        if _PERPLEXITY not in self.measured.measure.task.metrics:
            return None
        return figures.value(self.measured.measure, records, _PERPLEXITY)

    def gain(self, steered: Steered) -> Interval:
        return figures.difference(self.measured.measure, steered.records, steered.fixed.records, self.reading.metric)

    def losses(self, curve: Sequence[Point]) -> list[Interval]:
        return [figures.loss_against_full(self.measured.measure, point, curve[-1], self.reading) for point in curve]

    def area(self, curve: Sequence[Point]) -> Interval:
        return figures.curve_area(self.measured.measure, curve, self.reading.metric)

    def area_more(self, curve: Sequence[Point], than: Sequence[Point]) -> Interval:
        return figures.area_difference(self.measured.measure, curve, than, self.reading.metric)

    def area_more_from_common_rung(self, curve: Sequence[Point], than: Sequence[Point]) -> Interval:
        """From the first rung on that both curves have. Below it most is gained, and one of them may have no points:
        a line to its first rung would say nothing of it."""
        first = min({point.rung for point in curve[1:]} & {point.rung for point in than[1:]})
        start = max(point.rank for points in (curve, than) for point in points if point.rung == first)
        return figures.area_difference(self.measured.measure, curve, than, self.reading.metric, start)


def rank_report(measured: Sequence[Measured], notes: Sequence[str]) -> Report:
    """Long tables for programs; for people, those of areas and policies, and one of rungs by ladders per number."""
    read = [_Read(one, reading) for one in measured for reading in one.measure.readings]
    fixed = Table(
        "ranks",
        "Fixed rungs",
        (*_HEAD, "ladder", "rung", "mean rank", "value", "perplexity", "loss against full"),
        [row for one in read for row in _fixed_rows(one)],
    )
    areas = Table(
        "ranks-areas",
        "Area under the rank-quality curve, and the rung that is enough",
        (*_HEAD, "curve", "AURAC", "more", "enough", "surely", "MB", "saved"),
        [row for one in read for row in (*_area_rows(one), *_steered_area_rows(one))],
    )
    policies = _policies_table("ranks-policies", read)
    shown = [_rungs_by_ladder(one) for one in read]
    if policies.rows:
        shown.append(policies)
    tables = [fixed, areas, *([policies] if policies.rows else [])]
    return Report(notes, tables, [_panel(one) for one in read], shown=[*shown, areas])


def policies_report(measured: Sequence[Measured], notes: Sequence[str]) -> Report:
    """The table of the policies alone, and a plot of the differences; no curves are needed."""
    read = [_Read(one, reading) for one in measured for reading in one.measure.readings if one.steered]
    panels = [
        Panel(
            one.title,
            f"{one.reading.metric} less that of the fixed rung",
            "",
            [Series(steered.name, [0.0], [one.gain(steered)]) for steered in one.measured.steered],
            names=True,
        )
        for one in read
    ]
    return Report(notes, [_policies_table("policies", read)], panels)


def _policies_table(name: str, read: Sequence[_Read]) -> Table:
    return Table(
        name,
        "Policies against the fixed rung of the same mean rank",
        (*_HEAD, "policy", "mean rank", "prompt", "answer", "value", "fixed rank", "fixed value", "difference"),
        [row for one in read for row in _steered_rows(one)],
    )


def _fixed_rows(one: _Read) -> Iterator[tuple[Cell, ...]]:
    for name, curve in one.measured.curves.items():
        for point, loss in zip(curve, one.losses(curve), strict=True):
            records = point.records
            yield *one.head, name, point.rung, point.rank, one.value(records), one.perplexity(records), loss


def _rungs_by_ladder(one: _Read) -> Table:
    """Rows are rungs, columns are ladders."""
    curves = one.measured.curves
    rungs = sorted({point.rung for curve in curves.values() for point in curve})
    by_ladder = [{point.rung: one.value(point.records) for point in curve} for curve in curves.values()]
    rows = [(rung, *(values.get(rung) for values in by_ladder)) for rung in rungs]
    return Table("", one.title, ("rung", *curves), rows)


def _area_rows(one: _Read) -> Iterator[tuple[Cell, ...]]:
    curves = one.measured.curves
    first = next(iter(curves.values()))
    for name, curve in curves.items():
        more = None if curve is first else one.area_more_from_common_rung(curve, first)
        yield *one.head, name, one.area(curve), more, *_enough(one, one.measured.ladders[name], curve)


def _enough(one: _Read, ladder: RankLadder, curve: Sequence[Point]) -> tuple[Cell, ...]:
    """The smallest rung within 1 % of full rank, by the values and by the upper ends of their intervals; what the
    factors cut at the former take, and the share that this saves."""
    losses = one.losses(curve)
    enough = curve[figures.smallest_enough([loss.value for loss in losses])].rung
    surely = curve[figures.smallest_enough([loss.high for loss in losses])].rung
    taken = dict(zip(ladder.rungs, factor_bytes(ladder), strict=True))
    return enough, surely, taken[enough] / 1e6, f"{1.0 - taken[enough] / taken[ladder.trained_rank]:.1%}"


def _steered_rows(one: _Read) -> Iterator[tuple[Cell, ...]]:
    for steered in one.measured.steered:
        ranks = figures.mean_ranks(steered.records)
        fixed = steered.fixed
        yield (
            *one.head,
            steered.name,
            ranks.all,
            ranks.prompt,
            ranks.answer,
            one.value(steered.records),
            fixed.rank,
            one.value(fixed.records),
            one.gain(steered),
        )


def _steered_area_rows(one: _Read) -> Iterator[tuple[Cell, ...]]:
    """Areas through base, policies and full rank, and through fixed rungs at the policies' ranks instead: areas over
    the same few ranks, which may be compared with one another but not with those of denser curves."""
    if not one.measured.steered:
        return
    curve = next(iter(one.measured.curves.values()))
    adaptive, fixed = (
        [curve[0], *sorted(inner, key=lambda point: point.rank), curve[-1]]
        for inner in (
            [steered.point for steered in one.measured.steered],
            [steered.fixed for steered in one.measured.steered],
        )
    )
    empty: tuple[Cell, ...] = (None, None, None, None)
    yield *one.head, "fixed at policies' ranks", one.area(fixed), None, *empty
    yield *one.head, "policies", one.area(adaptive), one.area_more(adaptive, fixed), *empty


def _panel(one: _Read) -> Panel:
    """Differences to full rank, whose paired intervals are narrow, and without the base model, which would press all
    others into a line."""
    curves = one.measured.curves
    base, *_, full = next(iter(curves.values()))

    def less_full(records: Sequence[Record]) -> Interval:
        return figures.difference(one.measured.measure, records, full.records, one.reading.metric)

    series = [
        Series(name, [point.rank for point in curve[1:]], [less_full(point.records) for point in curve[1:]])
        for name, curve in curves.items()
    ]
    steered = one.measured.steered
    if steered:
        ranks = [policy.point.rank for policy in steered]
        series.append(Series("policies", ranks, [less_full(policy.records) for policy in steered], joined=False))
    ends = f"base {one.value(base.records).value:.4g}, full rank {one.value(full.records).value:.4g}"
    title = f"{one.title} ({ends})"
    return Panel(title, "mean active rank, executed", f"{one.reading.metric} less full rank", series, rank_axis=True)

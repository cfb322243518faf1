"""Quality against rank: four ladders at fixed rungs, and policies at the mean rank that they execute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chunkwise.config.experiment_settings import ExperimentSettings, SubjectChoice
from chunkwise.config.policy import SteeringPolicy, load_policy
from chunkwise.evaluation.bootstrap import Interval
from chunkwise.evaluation.experiments import figures
from chunkwise.evaluation.experiments.arms import SERVED, factor_bytes, four_ladders, matched_ladder
from chunkwise.evaluation.experiments.figures import Point
from chunkwise.evaluation.experiments.lab import Lab
from chunkwise.evaluation.experiments.measures import (
    Measure,
    Reading,
    Sizes,
    calibration_text,
    generation,
    likelihood,
)
from chunkwise.evaluation.experiments.report import Panel, Report, Series
from chunkwise.evaluation.experiments.tables import Cell, Table
from chunkwise.evaluation.modes import BASE, SteeringMode, fixed_rung
from chunkwise.evaluation.results import Record
from chunkwise_adapters.format import LoraWeights
from chunkwise_adapters.ladder import RankLadder

_SIZES, _QUICK_SIZES = Sizes(items=32), Sizes(items=4)
_FRACTIONS, _QUICK_FRACTIONS = (0.25, 0.5), (0.25,)
_ADAPTIVE, _MATCHED = "policies", "fixed at their ranks"


@dataclass(frozen=True, slots=True)
class Steered:
    """A policy's run, and that of the fixed rung of the same executed mean rank."""

    name: str
    records: Sequence[Record]
    fixed: Point


@dataclass(slots=True)
class _Rows:
    """Rows of the tables, and panels, as they come in."""

    runs: list[tuple[Cell, ...]] = field(default_factory=list)
    steered: list[tuple[Cell, ...]] = field(default_factory=list)
    areas: list[tuple[Cell, ...]] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)


def run(lab: Lab, settings: ExperimentSettings) -> Report:
    """The report over all subjects.

    Raises:
        ChunkwiseError: data, adapters or policies that cannot be used.
    """
    policies = {Path(file).stem: load_policy(Path(file)) for file in settings.policies}
    rows = _Rows()
    for subject in settings.subjects:
        _subject(lab, settings, subject, policies, rows)
    return Report(_notes(settings), _tables(rows), rows.panels)


def rungs_of(trained_rank: int, quick: bool) -> list[float]:
    """The rungs between the base model and full rank: fractions, and the powers of two, quick every other one."""
    powers = [1 << i for i in range(0, trained_rank.bit_length(), 2 if quick else 1)]
    return [*(_QUICK_FRACTIONS if quick else _FRACTIONS), *(power for power in powers if power < trained_rank)]


def _subject(
    lab: Lab,
    settings: ExperimentSettings,
    subject: SubjectChoice,
    policies: Mapping[str, SteeringPolicy],
    rows: _Rows,
) -> None:
    weights = lab.weights(subject.adapter)
    text = calibration_text(subject, settings.calibration_tokens, settings.seed, lab.tokenizer)
    rungs = rungs_of(weights.trained_rank, settings.quick)
    ladders = four_ladders(weights, [0, *rungs], lab.whitened(weights, text))
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    measures = [likelihood(subject, sizes, "prompt", settings, lab.tokenizer)]
    generated = generation(subject, sizes, settings, lab.tokenizer)
    for measure in [*measures, *([generated] if generated else [])]:
        # Generated answers cost most and say least, so they are asked for on the ladder that is served alone.
        chosen = {name: ladders[name] for name in ([SERVED] if measure is generated else ladders)}
        curves = _curves(lab, measure, weights, chosen)
        steered = [_steer(lab, measure, weights, ladders[SERVED], name, policy) for name, policy in policies.items()]
        for reading in measure.readings:
            _read(weights, measure, reading, chosen, curves, steered, rows)


def _curves(
    lab: Lab, measure: Measure, weights: LoraWeights, ladders: Mapping[str, RankLadder]
) -> dict[str, list[Point]]:
    """Every ladder's points from the base model to full rank. All ladders share these two: they differ by rounding."""
    base = Point(0.0, lab.run(measure, BASE, f"{weights.name} base"))
    served = next(iter(ladders.values()))
    with lab.resident(*ladders.values()) as adapters:
        mode = SteeringMode("full", served.name)
        full = Point(float(weights.trained_rank), lab.run(measure, mode, f"{weights.name} full"))
        curves: dict[str, list[Point]] = {}
        for name, ladder in ladders.items():
            inner = [
                Point(rung, lab.run(measure, fixed_rung(rung, adapters[ladder.name]), f"{ladder.name} rung {rung:g}"))
                for rung in ladder.rungs
                if 0 < rung < weights.trained_rank
            ]
            curves[name] = [base, *inner, full]
    return curves


def _steer(
    lab: Lab, measure: Measure, weights: LoraWeights, ladder: RankLadder, name: str, policy: SteeringPolicy
) -> Steered:
    with lab.resident(ladder):
        records = lab.run(measure, SteeringMode("policy", ladder.name, policy), f"{weights.name} {name}")
    fixed = matched_ladder(weights, ladder, figures.mean_ranks(records).all)
    with lab.resident(fixed) as adapters:
        rung = fixed.rungs[0]
        reference = lab.run(measure, fixed_rung(rung, adapters[fixed.name]), f"{weights.name} {fixed.name}")
    return Steered(name, records, Point(rung, reference))


def _read(
    weights: LoraWeights,
    measure: Measure,
    reading: Reading,
    ladders: Mapping[str, RankLadder],
    curves: Mapping[str, Sequence[Point]],
    steered: Sequence[Steered],
    rows: _Rows,
) -> None:
    """Adds what one number of a measure says."""
    head = (weights.name, measure.name, reading.metric)
    series: list[Series] = []
    for name, curve in curves.items():
        values = [figures.value(measure, point.records, reading.metric) for point in curve]
        losses = [figures.loss_against_full(measure, point, curve[-1], reading) for point in curve]
        for point, value, loss in zip(curve, values, losses, strict=True):
            rows.runs.append((*head, name, point.rung, point.rank, value, loss))
        series.append(Series(name, [point.rank for point in curve], values))
        rows.areas.append((*head, name, *_area(measure, reading, curve, curves), *_enough(ladders[name], losses)))
    if steered:
        series.append(_read_steered(measure, reading, head, steered, rows))
        rows.areas += _steered_areas(measure, reading, head, steered, next(iter(curves.values())))
    title = f"{weights.name}, {measure.name}"
    rows.panels.append(Panel(title, "mean active rank, executed", reading.metric, series, rank_axis=True))


def _area(
    measure: Measure, reading: Reading, curve: Sequence[Point], curves: Mapping[str, Sequence[Point]]
) -> tuple[Interval, Interval | None]:
    """A curve's area, and what it is more than that of the first curve."""
    first = next(iter(curves.values()))
    more = None if curve is first else figures.area_difference(measure, curve, first, reading.metric)
    return figures.curve_area(measure, curve, reading.metric), more


def _enough(ladder: RankLadder, losses: Sequence[Interval]) -> tuple[Cell, ...]:
    """The smallest rung within 1 % of full rank, by the values and by the upper ends of their intervals; what the
    factors cut at the former take, and the share that this saves."""
    # Without the base model where the ladder has no rung 0: it is the curve's first point, and the ladder's too.
    by_value = figures.smallest_enough([loss.value for loss in losses])
    surely = figures.smallest_enough([loss.high for loss in losses])
    taken = factor_bytes(ladder)
    return (
        ladder.rungs[by_value],
        ladder.rungs[surely],
        taken[by_value] / 1e6,
        f"{1.0 - taken[by_value] / taken[-1]:.1%}",
    )


def _read_steered(
    measure: Measure, reading: Reading, head: tuple[Cell, ...], steered: Sequence[Steered], rows: _Rows
) -> Series:
    values = []
    for one in steered:
        ranks = figures.mean_ranks(one.records)
        values.append(figures.value(measure, one.records, reading.metric))
        rows.steered.append(
            (
                *head,
                one.name,
                ranks.all,
                ranks.prompt,
                ranks.answer,
                values[-1],
                one.fixed.rank,
                figures.value(measure, one.fixed.records, reading.metric),
                figures.difference(measure, one.records, one.fixed.records, reading.metric),
            )
        )
    return Series(_ADAPTIVE, [figures.mean_ranks(one.records).all for one in steered], values, joined=False)


def _steered_areas(
    measure: Measure, reading: Reading, head: tuple[Cell, ...], steered: Sequence[Steered], curve: Sequence[Point]
) -> list[tuple[Cell, ...]]:
    """Areas through base, policies and full rank, and through fixed rungs at the policies' ranks instead: areas over
    the same few ranks, which may be compared with one another but not with those of denser curves."""
    ends = curve[0], curve[-1]
    adaptive = [Point(figures.mean_ranks(one.records).all, one.records) for one in steered]
    fixed = [one.fixed for one in steered]
    curves = [[ends[0], *sorted(inner, key=lambda point: point.rank), ends[1]] for inner in (adaptive, fixed)]
    areas = [figures.curve_area(measure, points, reading.metric) for points in curves]
    more = figures.area_difference(measure, curves[0], curves[1], reading.metric)
    empty: tuple[Cell, ...] = (None, None, None, None)
    return [(*head, _MATCHED, areas[1], None, *empty), (*head, _ADAPTIVE, areas[0], more, *empty)]


def _notes(settings: ExperimentSettings) -> list[str]:
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    return [
        f"{settings.items or sizes.items} items a task, drawn with seed {settings.seed}; text in windows of "
        f"{sizes.window} tokens; whitened ladders fitted to {settings.calibration_tokens} tokens of data that is not "
        "measured. Brackets: 95 %, bootstrap over items; differences and losses are paired.",
        "Ranks are means over all computed positions, prompts included, as executed. A policy is compared with the "
        f"fixed rung of the same mean rank ({SERVED} ladder).",
        "AURAC: mean over log2(1 + rank) of the share of the adapter's gain over the base model that a rank gives; the "
        "column behind it is relative to the first curve, for policies to fixed rungs at the same ranks.",
        "Enough: smallest rung from which on all lose at most 1 % of full rank's perplexity, or score; surely: by the "
        "upper end of the interval. Bytes are of the factors cut there, in fp32.",
    ]


def _tables(rows: _Rows) -> list[Table]:
    head = ("adapter", "task", "metric")
    cost = ("policy", "mean rank", "prompt", "answer", "value", "fixed rank", "fixed value", "difference")
    area = ("curve", "AURAC", "AURAC more", "enough", "surely", "MB", "saved")
    tables = [
        Table("ranks", "Fixed rungs", (*head, "ladder", "rung", "mean rank", "value", "loss against full"), rows.runs),
        Table("ranks-areas", "Areas under the curves, and the rung that is enough", (*head, *area), rows.areas),
    ]
    if rows.steered:
        tables.insert(
            1, Table("ranks-policies", "Policies against fixed rungs of equal cost", (*head, *cost), rows.steered)
        )
    return tables

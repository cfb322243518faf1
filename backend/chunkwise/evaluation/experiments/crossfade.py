"""The cross-fade window: what it does to all tokens, and to those right behind a change of rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from chunkwise.config.experiment_settings import ExperimentSettings, SubjectChoice
from chunkwise.config.policy import SteeringPolicy
from chunkwise.evaluation.bootstrap import Interval, exp_ratio, interval, paired_difference, ratio
from chunkwise.evaluation.experiments import figures
from chunkwise.evaluation.experiments.arms import BOUNDARY_TOKENS, read_policies, varied_policy
from chunkwise.evaluation.experiments.lab import Lab
from chunkwise.evaluation.experiments.measures import Sizes, likelihood
from chunkwise.evaluation.experiments.report import Panel, Report, Series
from chunkwise.evaluation.experiments.tables import Cell, Table
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.results import Record

WINDOWS = (0, 1, 4, 8, 16)
_SIZES, _QUICK_SIZES = Sizes(windows=16, rows=64), Sizes(windows=4, rows=8, window=256)
_METRIC = "nll_per_token"
_COLUMNS = (
    "adapter",
    "task",
    "window",
    "mean rank",
    "perplexity",
    "NLL less window 0",
    "boundary tokens",
    "boundary perplexity",
    "boundary NLL less window 0",
)


def run(lab: Lab, settings: ExperimentSettings) -> Report:
    """The report over all subjects.

    Raises:
        ChunkwiseError: data, adapters or a policy that cannot be used.
    """
    policies = read_policies(settings.policies).values()
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    rows: list[tuple[Cell, ...]] = []
    panels: list[Panel] = []
    for subject in settings.subjects:
        policy = varied_policy(policies, subject.adapter.name, skip_below=0.5)
        found, panel = _subject(lab, settings, subject, sizes, policy)
        rows += found
        panels.append(panel)
    notes = (
        f"Boundary tokens are those predicted at the {BOUNDARY_TOKENS} positions from a change of rank on, taken from "
        "the run without cross-fade, so that all windows are judged on the same tokens.",
        "A cross-fade costs the wider of its two rungs, so the mean rank rises with the window. Brackets: 95 %, "
        "bootstrap over items; differences are paired.",
        f"Text is scored as part of the prompt, answers as decoded: {sizes.told(settings.items)}, drawn with seed "
        f"{settings.seed}.",
    )
    return Report(notes, [Table("crossfade", "Cross-fade window in tokens", _COLUMNS, rows)], panels)


def boundary_tokens(record: Record) -> list[int]:
    """Indices into the record's ``nll`` of the tokens predicted less than `BOUNDARY_TOKENS` positions behind a change
    of the executed rank."""
    changes: list[int] = []
    position = 0
    for count, _ in record["rank_runs"][:-1]:
        position += count
        changes.append(position)
    near = {place for change in changes for place in range(change, change + BOUNDARY_TOKENS)}
    before_first = record["first"] - 1
    return [index for index in range(len(record["nll"])) if before_first + index in near]


def with_window(policy: SteeringPolicy, window: int) -> SteeringPolicy:
    """The policy with a cross-fade window, and chunks that are long enough for every window that is tried."""
    chunker = policy.chunker
    shortest = max(chunker.min_length, max(WINDOWS))
    chunker = replace(chunker, min_length=shortest, max_length=max(chunker.max_length, shortest))
    return replace(policy, chunker=chunker, rank=replace(policy.rank, crossfade=window))


def _subject(
    lab: Lab, settings: ExperimentSettings, subject: SubjectChoice, sizes: Sizes, policy: SteeringPolicy
) -> tuple[list[tuple[Cell, ...]], Panel]:
    weights = lab.weights(subject.adapter)
    measure = likelihood(subject, sizes, settings, lab.tokenizer)
    ladder = lab.served(subject.adapter, weights)
    runs: dict[int, Sequence[Record]] = {}
    with lab.resident(ladder):
        for window in WINDOWS:
            mode = SteeringMode("policy", ladder.name, with_window(policy, window))
            runs[window] = lab.run(measure, mode, f"{weights.name} window {window}")
    boundary = {window: _boundary_sums(runs[0], records) for window, records in runs.items()}
    seed = settings.seed
    rows: list[tuple[Cell, ...]] = []
    differences: dict[str, list[Interval]] = {"all tokens": [], "boundary tokens": []}
    for window, records in runs.items():
        overall = figures.difference(measure, records, runs[0], _METRIC)
        at_boundary = paired_difference(boundary[window], boundary[0], ratio, seed)
        differences["all tokens"].append(overall)
        differences["boundary tokens"].append(at_boundary)
        rows.append(
            (
                weights.name,
                measure.name,
                window,
                figures.mean_ranks(records).all,
                figures.value(measure, records, "perplexity"),
                overall,
                int(sum(count for _, count in boundary[window])),
                interval(boundary[window], exp_ratio, seed),
                at_boundary,
            )
        )
    series = [Series(name, [float(window) for window in WINDOWS], values) for name, values in differences.items()]
    title = f"{weights.name}, {measure.name}"
    return rows, Panel(title, "cross-fade window in tokens", "NLL per token less window 0", series)


def _boundary_sums(reference: Sequence[Record], records: Sequence[Record]) -> list[tuple[float, float]]:
    """Per item, the NLL and the number of the tokens that are at a boundary in ``reference``."""
    sums = []
    for known, record in zip(reference, records, strict=True):
        chosen = boundary_tokens(known)
        sums.append((sum(record["nll"][index] for index in chosen), float(len(chosen))))
    return sums

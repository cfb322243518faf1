"""KV policies: quality of long text and of answers, and the bytes that the cache really holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from chunkwise.config.experiment_settings import ExperimentSettings, SubjectChoice
from chunkwise.config.policy import KvKind, KvPolicy, RankPolicy, SteeringPolicy, load_policy
from chunkwise.evaluation.experiments import figures
from chunkwise.evaluation.experiments.lab import Lab
from chunkwise.evaluation.experiments.measures import Measure, Reading, Sizes, generation, likelihood
from chunkwise.evaluation.experiments.report import Panel, Report, Series
from chunkwise.evaluation.experiments.tables import Cell, Table
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.results import Record

FULL = "full"
KINDS: tuple[KvKind, ...] = get_args(KvKind)
"""Policies that need no file: every chunk in the format once it is old enough."""
_SIZES = Sizes(windows=8, rows=64, window=2048, context=1024)
_QUICK_SIZES = Sizes(windows=2, rows=8, window=1024, context=768)
_COLUMNS = (
    "adapter",
    "task",
    "metric",
    "policy",
    "value",
    "less full",
    "peak MB",
    "of full",
    "end MB an item",
    "end of full",
)


def run(lab: Lab, settings: ExperimentSettings) -> Report:
    """The report over all subjects; without policies, of all built-in formats.

    Raises:
        ChunkwiseError: data, adapters or policies that cannot be used.
    """
    policies = kv_policies(settings.policies)
    rows: list[tuple[Cell, ...]] = []
    panels: list[Panel] = []
    for subject in settings.subjects:
        _subject(lab, settings, subject, policies, rows, panels)
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    notes = (
        f"{sizes.told(settings.items)}, drawn with seed {settings.seed}; {sizes.context} tokens of a window are the "
        "prompt, the others are decoded one by one as given. The adapter is at full rank throughout.",
        "Peak: the most that the allocator's pages took in any step of a batch, prompts included. End: what an item "
        "held before it was released, mean over items. Brackets: 95 %, bootstrap over items; differences are paired.",
    )
    return Report(notes, [Table("kv", "KV policies", _COLUMNS, rows)], panels)


def kv_policies(names: Sequence[str]) -> dict[str, SteeringPolicy]:
    """Policies by name, the uncompressed one first: kinds, and files, whose ranks are not used. All are always in
    force, because nothing here runs short of memory.

    Raises:
        InvalidPolicy: a name that is neither a kind nor a policy file.
    """
    policies: dict[str, SteeringPolicy] = {}
    for name in (FULL, *(names or KINDS)):
        kind = next((kind for kind in KINDS if kind == name), None)
        if kind is not None:
            policies[name] = SteeringPolicy(kv=KvPolicy(kind=kind, when="always"))
        else:
            policy = load_policy(Path(name))
            policies[Path(name).stem] = replace(policy, kv=replace(policy.kv, when="always"))
    return policies


def _subject(
    lab: Lab,
    settings: ExperimentSettings,
    subject: SubjectChoice,
    policies: Mapping[str, SteeringPolicy],
    rows: list[tuple[Cell, ...]],
    panels: list[Panel],
) -> None:
    weights = lab.weights(subject.adapter)
    sizes = _QUICK_SIZES if settings.quick else _SIZES
    measure = generation(subject, sizes, settings, lab.tokenizer)
    if measure is None:
        measure = likelihood(subject, sizes, settings, lab.tokenizer, "decode")
    ladder = lab.served(subject.adapter, weights)
    with lab.resident(ladder):
        runs = {
            name: lab.run(
                measure,
                SteeringMode("policy", ladder.name, replace(policy, rank=RankPolicy(), adapters={})),
                f"{weights.name} kv {name}",
            )
            for name, policy in policies.items()
        }
    for reading in measure.readings:
        _read(weights.name, measure, reading, runs, rows, panels)


def _read(
    adapter: str,
    measure: Measure,
    reading: Reading,
    runs: Mapping[str, Sequence[Record]],
    rows: list[tuple[Cell, ...]],
    panels: list[Panel],
) -> None:
    series: list[Series] = []
    peak_of_full, end_of_full = _held(runs[FULL])
    for name, records in runs.items():
        value = figures.value(measure, records, reading.tolerance_metric)
        less = None if name == FULL else figures.difference(measure, records, runs[FULL], reading.tolerance_metric)
        peak, end = _held(records)
        bytes_held = (peak / 1e6, _percent(peak / peak_of_full), end / 1e6, _percent(end / end_of_full))
        rows.append((adapter, measure.name, reading.tolerance_metric, name, value, less, *bytes_held))
        series.append(Series(name, (end / end_of_full,), (value,), joined=False))
    xlabel = "KV bytes held at the end, share of uncompressed"
    panels.append(Panel(f"{adapter}, {measure.name}", xlabel, reading.tolerance_metric, series))


def _held(records: Sequence[Record]) -> tuple[float, float]:
    """The allocator's peak, and the mean of what items held at their end, in bytes."""
    peak = max(record["pool_bytes_peak"] for record in records)
    return peak, sum(record["kv_bytes"][2] for record in records) / len(records)


def _percent(share: float) -> str:
    return f"{share:.1%}"

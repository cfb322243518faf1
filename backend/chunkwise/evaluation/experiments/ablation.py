"""Signals of the complexity estimator, each alone and all but each, against the fixed rung of the same cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from chunkwise.config.experiment_settings import ExperimentSettings, SubjectChoice
from chunkwise.config.policy import EstimatorPolicy, SteeringPolicy
from chunkwise.evaluation.experiments import figures
from chunkwise.evaluation.experiments.arms import matched_ladder, read_policies, varied_policy
from chunkwise.evaluation.experiments.lab import Lab
from chunkwise.evaluation.experiments.measures import Sizes, likelihood
from chunkwise.evaluation.experiments.report import Panel, Report, Series
from chunkwise.evaluation.experiments.tables import Cell, Table
from chunkwise.evaluation.modes import SteeringMode, fixed_rung

SIGNALS = ("entropy", "novelty", "attention", "position")
_SIZES = Sizes(windows=16, rows=64, context=64)
_QUICK_SIZES = Sizes(windows=4, rows=8, window=256, context=64)
_METRIC = "nll_per_token"
_COLUMNS = (
    "adapter",
    "task",
    "signals",
    "mean rank",
    "prompt",
    "answer",
    "NLL",
    "fixed rank",
    "fixed NLL",
    "difference",
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
        policy = varied_policy(policies, subject.adapter.name)
        found, panel = _subject(lab, settings, subject, sizes, policy)
        rows += found
        panels.append(panel)
    notes = (
        "Every arm changes which signals make the complexity that chooses the rank; all else is one policy.",
        "Difference: NLL per token less that of the fixed rung of the same executed mean rank, on the same items "
        "(ranks that keep the most energy for their cost); below 0 the signals earn their keep. "
        "Brackets: 95 %, bootstrap over items.",
        f"Tokens are decoded one by one as given: {sizes.told(settings.items)}, drawn with seed {settings.seed}.",
    )
    title = "Signals alone and left out, against a fixed rung of equal cost"
    return Report(notes, [Table("ablation", title, _COLUMNS, rows)], panels)


def variants(policy: SteeringPolicy) -> Mapping[str, SteeringPolicy]:
    """The policy, by complexity and not by what was calibrated, with all its signals, with each alone, and without each
    that has a weight. A signal that is alone keeps its weight, or takes 1 if it has none."""
    policy = replace(policy, rank=replace(policy.rank, source="complexity"), adapters={})
    weights = {name: getattr(policy.estimator, name).weight for name in SIGNALS}
    arms = {"all": policy}
    for name in SIGNALS:
        arms[f"{name} alone"] = _weighted(policy, dict.fromkeys(SIGNALS, 0.0) | {name: weights[name] or 1.0})
    for name in SIGNALS:
        if weights[name]:
            arms[f"without {name}"] = _weighted(policy, weights | {name: 0.0})
    return arms


def _weighted(policy: SteeringPolicy, weights: Mapping[str, float]) -> SteeringPolicy:
    estimator: EstimatorPolicy = policy.estimator
    signals = {name: replace(getattr(estimator, name), weight=weight) for name, weight in weights.items()}
    return replace(policy, estimator=replace(estimator, **signals))


def _subject(
    lab: Lab, settings: ExperimentSettings, subject: SubjectChoice, sizes: Sizes, policy: SteeringPolicy
) -> tuple[list[tuple[Cell, ...]], Panel]:
    weights = lab.weights(subject.adapter)
    measure = likelihood(subject, sizes, settings, lab.tokenizer, "decode")
    # At a fixed rung it makes no difference how a token is scored, and this is the faster way.
    at_once = likelihood(subject, sizes, settings, lab.tokenizer, "prompt")
    ladder = lab.served(subject.adapter, weights)
    rows: list[tuple[Cell, ...]] = []
    series: list[Series] = []
    for arm, variant in variants(policy).items():
        with lab.resident(ladder):
            records = lab.run(measure, SteeringMode("policy", ladder.name, variant), f"{weights.name} {arm}")
        ranks = figures.mean_ranks(records)
        fixed = matched_ladder(weights, ladder, ranks.all)
        with lab.resident(fixed) as adapters:
            reference = lab.run(at_once, fixed_rung(fixed.rungs[0], adapters[fixed.name]), fixed.name)
        difference = figures.difference(measure, records, reference, _METRIC)
        steered = (ranks.all, ranks.prompt, ranks.answer, figures.value(measure, records, _METRIC))
        constant = (fixed.mean_active_rank[0], figures.value(measure, reference, _METRIC))
        rows.append((weights.name, measure.name, arm, *steered, *constant, difference))
        series.append(Series(arm, (), (difference,)))
    title, xlabel = f"{weights.name}, {measure.name}", "NLL per token less that of the fixed rung"
    return rows, Panel(title, xlabel, "", series, names=True)

"""Quality against rank: all ladders at fixed rungs, and policies at the mean rank that they execute; or the policies
alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from chunkwise.config.experiment_settings import ExperimentSettings, SubjectChoice
from chunkwise.config.policy import SteeringPolicy
from chunkwise.evaluation.experiments import figures
from chunkwise.evaluation.experiments.arms import DEFAULT, all_ladders, matched_ladder, read_policies, steers
from chunkwise.evaluation.experiments.figures import Point
from chunkwise.evaluation.experiments.lab import Lab
from chunkwise.evaluation.experiments.measures import Measure, Sizes, calibration_text, generation, likelihood
from chunkwise.evaluation.experiments.rank_report import Measured, Steered, policies_report, rank_report
from chunkwise.evaluation.experiments.report import Report
from chunkwise.evaluation.modes import BASE, SteeringMode, fixed_rung
from chunkwise_adapters.format import LoraWeights
from chunkwise_adapters.ladder import RankLadder

_SIZES, _QUICK_SIZES = Sizes(windows=16, rows=64), Sizes(windows=3, rows=8)
_QUICK_RUNGS = (0.25, 1, 4)
_DECODE_WINDOW, _DECODE_CONTEXT = 192, 32
_POLICY_NOTE = (
    "Ranks are means over all computed positions, prompts included, as executed: modules weighted by their size. A "
    "policy is compared with a fixed rung of the ladder that is served, with global ranks, of the same mean rank."
)


def run(lab: Lab, settings: ExperimentSettings) -> Report:
    """The report over all subjects.

    Raises:
        ChunkwiseError: data, adapters or policies that cannot be used.
    """
    policies = read_policies(settings.policies)
    measured = [one for subject in settings.subjects for one in _subject(lab, settings, subject, policies)]
    sizes = _sizes(settings)
    notes = [
        f"{sizes.told(settings.items)}, drawn with seed {settings.seed}; whitened and sensitive ladders fitted to "
        f"{settings.calibration_tokens} tokens of data that is not measured. Brackets: 95 %, bootstrap over items; "
        "differences and losses are paired.",
        _POLICY_NOTE,
        "AURAC: mean over log2(1 + rank) of the share of the adapter's gain over the base model that a rank gives; "
        "more: than that of the first curve, from the first rung on that both have; for policies, than that of fixed "
        "rungs at their ranks.",
        "Enough: smallest rung from which on all lose at most 1 % of full rank's perplexity, or score; surely: by the "
        "upper end of the interval. Bytes are of the factors cut at the former, in fp32.",
    ]
    return rank_report(measured, notes)


def run_policies(lab: Lab, settings: ExperimentSettings) -> Report:
    """The policies alone, each against the fixed rung of the same mean rank. Raises as `run`."""
    policies = read_policies(settings.policies)
    sizes = _sizes(settings)
    if settings.decode_text:
        sizes = replace(sizes, window=_DECODE_WINDOW, context=_DECODE_CONTEXT)
    measured = []
    for subject in settings.subjects:
        weights = lab.weights(subject.adapter)
        served = lab.served(subject.adapter, weights)
        own = {name: policy for name, policy in policies.items() if steers(policy, weights.name)}
        likely = likelihood(subject, sizes, settings, lab.tokenizer, "decode" if settings.decode_text else None)
        generated = generation(subject, sizes, settings, lab.tokenizer)
        for measure in [likely, *([generated] if generated else [])]:
            steered = [_steer(lab, measure, weights, served, name, policy) for name, policy in own.items()]
            measured.append(Measured(weights.name, measure, {}, {}, steered))
    drawn = (
        f"{sizes.told(settings.items)}, drawn with seed {settings.seed}. Brackets: 95 %, paired bootstrap over items."
    )
    return policies_report(measured, [drawn, _POLICY_NOTE])


def _sizes(settings: ExperimentSettings) -> Sizes:
    return _QUICK_SIZES if settings.quick else _SIZES


def _subject(
    lab: Lab, settings: ExperimentSettings, subject: SubjectChoice, policies: Mapping[str, SteeringPolicy]
) -> Iterator[Measured]:
    weights = lab.weights(subject.adapter)
    text = calibration_text(subject, settings.calibration_tokens, settings.seed, lab.tokenizer)
    ladders = all_ladders(weights, lab.whitened(weights, text), lab.sensitive(weights, text))
    served = lab.served(subject.adapter, weights)
    own = {name: policy for name, policy in policies.items() if steers(policy, weights.name)}
    sizes = _sizes(settings)
    likely = likelihood(subject, sizes, settings, lab.tokenizer)
    generated = generation(subject, sizes, settings, lab.tokenizer)
    for measure in [likely, *([generated] if generated else [])]:
        # Generated answers cost most and say least, so one ladder is asked for them.
        chosen = {name: ladders[name] for name in ([DEFAULT] if measure is generated else ladders)}
        curves = _curves(lab, measure, weights, chosen, settings.quick)
        steered = [_steer(lab, measure, weights, served, name, policy) for name, policy in own.items()]
        yield Measured(weights.name, measure, chosen, curves, steered)


def _curves(
    lab: Lab, measure: Measure, weights: LoraWeights, ladders: Mapping[str, RankLadder], quick: bool
) -> dict[str, list[Point]]:
    """Every ladder's points from the base model to full rank. All ladders share these two: they differ by rounding."""
    base = Point(0, lab.run(measure, BASE, f"{weights.name} base"))
    first = next(iter(ladders.values()))
    with lab.resident(*ladders.values()) as adapters:
        full = lab.run(measure, SteeringMode("full", first.name), f"{weights.name} full")
        curves: dict[str, list[Point]] = {}
        for name, ladder in ladders.items():
            inner = [
                Point(rung, lab.run(measure, fixed_rung(rung, adapters[ladder.name]), f"{ladder.name} rung {rung:g}"))
                for rung in ladder.rungs
                if 0 < rung < weights.trained_rank and (rung in _QUICK_RUNGS or not quick)
            ]
            curves[name] = [base, *inner, Point(weights.trained_rank, full)]
    return curves


def _steer(
    lab: Lab, measure: Measure, weights: LoraWeights, ladder: RankLadder, name: str, policy: SteeringPolicy
) -> Steered:
    with lab.resident(ladder):
        records = lab.run(measure, SteeringMode("policy", ladder.name, policy), f"{weights.name} {name}")
    fixed = matched_ladder(weights, ladder, figures.mean_ranks(records).all)
    with lab.resident(fixed) as adapters:
        rung = fixed.rungs[0]
        reference = lab.run(measure, fixed_rung(rung, adapters[fixed.name]), fixed.name)
    return Steered(name, records, Point(rung, reference))

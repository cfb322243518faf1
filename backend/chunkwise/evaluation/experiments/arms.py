"""Ladders and policies that experiments compare: four ladders of an adapter, a fixed rung of any mean rank, and the
policy whose parts are varied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from chunkwise.config.policy import ChunkerPolicy, KvPolicy, RankPolicy, SteeringPolicy, load_policy
from chunkwise.evaluation.trace import weighted_ranks
from chunkwise_adapters.format import LoraWeights
from chunkwise_adapters.ladder import Allocation, LadderModule, RankLadder, assemble_ladder, build_ladder

DEFAULT = "plain+global"
"""What is served without a ladder file."""
BOUNDARY_TOKENS = 16
"""How far behind a change of rank a token counts as one at a boundary; also the longest cross-fade that is tried."""


def four_ladders(weights: LoraWeights, whitened: RankLadder) -> dict[str, RankLadder]:
    """The ladders by kind and allocation, named so, with their default rungs: uniform ones have no fractions."""
    plain = build_ladder(weights)
    return {
        "plain": _ladder(weights, plain, None, "uniform", f"{weights.name} plain"),
        DEFAULT: _ladder(weights, plain, None, "global", f"{weights.name} {DEFAULT}"),
        "whitened": _ladder(weights, whitened, None, "uniform", f"{weights.name} whitened"),
        "whitened+global": _ladder(weights, whitened, None, "global", f"{weights.name} whitened+global"),
    }


def matched_ladder(weights: LoraWeights, ladder: RankLadder, rank: float) -> RankLadder:
    """``ladder``'s factors with one rung beside full rank, whose cost comes nearest to a mean active rank, so that a
    fixed rung can be compared with steering at equal cost.

    Its ranks are where the most energy is kept for their cost, by singular value over the square root of the module's
    size: at equal cost this beats the global ladder, which orders by singular value alone, and from rank 1 on equals
    uniform ranks (README.md), so no policy is credited with what another fixed choice gives. ``kept_energy`` is of the
    values so divided.
    """
    count = len(ladder.modules)
    modules = {
        key: replace(module, singular_values=module.singular_values / math.sqrt(_size(module)))
        for key, module in ladder.modules.items()
    }
    by_cost = replace(ladder, modules=modules)

    def at(total: int) -> RankLadder:
        budget = total / count
        return _ladder(weights, by_cost, [budget], "global", f"{weights.name} fixed {budget:.4g}")

    low, high = 0, sum(len(module.singular_values) for module in ladder.modules.values())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if executed_ranks(at(middle))[0] <= rank else (low, middle)
    return min((at(low), at(high)), key=lambda one: abs(executed_ranks(one)[0] - rank))


def executed_ranks(ladder: RankLadder) -> tuple[float, ...]:
    """Per rung, the mean active rank that a trace shows for it: modules weighted by their size."""
    sizes = [_size(module) for module in ladder.modules.values()]
    return weighted_ranks(sizes, [ladder.active_ranks[key] for key in ladder.modules])


def factor_bytes(ladder: RankLadder) -> tuple[int, ...]:
    """Per rung, what the factors cut at it take in fp32."""
    sizes = [_size(module) for module in ladder.modules.values()]
    ranks = [ladder.active_ranks[key] for key in ladder.modules]
    return tuple(
        4 * sum(size * rank[i] for size, rank in zip(sizes, ranks, strict=True)) for i in range(len(ladder.rungs))
    )


def read_policies(files: Sequence[str]) -> dict[str, SteeringPolicy]:
    """Policies named after their files. Raises InvalidPolicy."""
    return {Path(file).stem: load_policy(Path(file)) for file in files}


def steers(policy: SteeringPolicy, adapter: str) -> bool:
    """Whether a policy says anything of an adapter: not one that was calibrated for others alone."""
    return not policy.adapters or adapter in policy.adapters


def varied_policy(policies: Iterable[SteeringPolicy], adapter: str, skip_below: float = 0.0) -> SteeringPolicy:
    """The policy that ablation and cross-fade vary: the first that steers the adapter, or ranks from 1 to 4 by
    complexity, and 0 below ``skip_below``, where the quality of adapters changes, with an uncompressed KV cache."""
    default = SteeringPolicy(
        chunker=ChunkerPolicy(min_length=BOUNDARY_TOKENS),
        rank=RankPolicy(source="complexity", min_rank=1, max_rank=4, skip_below=skip_below),
        kv=KvPolicy(kind="full"),
    )
    return next((policy for policy in policies if steers(policy, adapter)), default)


def _size(module: LadderModule) -> int:
    """What one rank of a module costs, in multiplications per token and in weights."""
    return module.a.shape[1] + module.b_t.shape[1]


def _ladder(
    weights: LoraWeights, factors: RankLadder, rungs: Sequence[float] | None, allocation: Allocation, name: str
) -> RankLadder:
    ladder = assemble_ladder(weights, factors.modules, rungs, allocation, factors.calibration)
    return replace(ladder, name=name)

"""Ladders and policies that experiments compare: all ladders of an adapter, a fixed rung of any mean rank, and the
policy whose parts are varied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from chunkwise.config.policy import ChunkerPolicy, KvPolicy, RankPolicy, SteeringPolicy, load_policy
from chunkwise_adapters.format import LoraWeights
from chunkwise_adapters.ladder import Allocation, RankLadder, assemble_ladder, build_ladder

DEFAULT = "plain+global"
"""What is served without a ladder file."""
BOUNDARY_TOKENS = 16
"""How far behind a change of rank a token counts as one at a boundary; also the longest cross-fade that is tried."""


def all_ladders(weights: LoraWeights, whitened: RankLadder, sensitive: RankLadder) -> dict[str, RankLadder]:
    """The ladders by kind and allocation, named so, with their default rungs: uniform ones have no fractions."""
    plain = build_ladder(weights)
    return {
        "plain": _ladder(weights, plain, None, "uniform", f"{weights.name} plain"),
        DEFAULT: _ladder(weights, plain, None, "global", f"{weights.name} {DEFAULT}"),
        "whitened": _ladder(weights, whitened, None, "uniform", f"{weights.name} whitened"),
        "whitened+global": _ladder(weights, whitened, None, "global", f"{weights.name} whitened+global"),
        "sensitive": _ladder(weights, sensitive, None, "global", f"{weights.name} sensitive"),
    }


def matched_ladder(weights: LoraWeights, ladder: RankLadder, rank: float) -> RankLadder:
    """``ladder`` with one rung beside full rank, whose cost comes nearest to a mean active rank, so that a fixed rung
    can be compared with steering at equal cost. Its ranks are global, which equal uniform ones or beat them
    (README.md), so no policy is credited with what another fixed choice gives."""
    return _ladder(weights, ladder, [rank], "global", f"{weights.name} fixed {rank:.4g}")


def factor_bytes(ladder: RankLadder) -> tuple[int, ...]:
    """Per rung, what the factors cut at it take in fp32."""
    return tuple(
        4 * sum(module.cost * ladder.active_ranks[key][i] for key, module in ladder.modules.items())
        for i in range(len(ladder.rungs))
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


def _ladder(
    weights: LoraWeights, factors: RankLadder, rungs: Sequence[float] | None, allocation: Allocation, name: str
) -> RankLadder:
    ladder = assemble_ladder(weights, factors.modules, rungs, allocation, factors.calibration)
    return replace(ladder, name=name)

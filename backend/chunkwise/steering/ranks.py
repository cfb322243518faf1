"""The rungs of one adapter as choices, and complexity to rung. Knows no tokens and no positions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from chunkwise.config.policy import RankPolicy
from chunkwise.core import AdapterInfo


@dataclass(frozen=True, slots=True)
class RankChoice:
    """A rung (None: no adapter), the mean rank over the adapter's modules that it activates, and its output scale."""

    rung: float | None
    active_rank: float
    scale: float


def rank_choices(
    adapter: AdapterInfo, energy_exponent: float, scales: Sequence[float] | None = None
) -> tuple[RankChoice, ...]:
    """The choices that an adapter offers, one per rung.

    Scale: ``scales``, one per rung, or else ``(E / E_k) ** (energy_exponent / 2)`` with E_k the squared singular values
    kept at the rung and E those of the largest rung, so exponent 1 restores the Frobenius norm of the full update.
    Where nothing is kept, it is 1.

    Raises:
        ValueError: the adapter has no rungs, or its tuples differ in length.
    """
    sizes = {len(adapter.rungs), len(adapter.kept_energy), len(adapter.mean_active_rank)}
    if len(sizes) != 1 or not adapter.rungs:
        raise ValueError(
            f"adapter {adapter.adapter_id!r} has {len(adapter.rungs)} rungs, {len(adapter.kept_energy)} energies "
            f"and {len(adapter.mean_active_rank)} active ranks; it needs at least one rung and one of each per rung"
        )
    total = adapter.kept_energy[-1]
    if scales is None:
        scales = [_energy_scale(kept, total, energy_exponent) for kept in adapter.kept_energy]
    return tuple(
        RankChoice(rung, active, scale)
        for rung, active, scale in zip(adapter.rungs, adapter.mean_active_rank, scales, strict=True)
    )


class RankSelector:
    """Chooses among the rungs of ``adapter`` by complexity, for ``source = "complexity"``.

    Wanted rank: ``min_rank · (max_rank / min_rank) ** complexity``, both bounds cut to the trained rank. The choice is
    the smallest rung that is at least the wanted rank, or the largest rung if none is. Below the complexity
    ``skip_below`` it is rung 0, if the ladder has one: the adapter is skipped. Raises as `rank_choices`.
    """

    def __init__(self, policy: RankPolicy, adapter: AdapterInfo) -> None:
        self._choices = rank_choices(adapter, policy.energy_exponent)
        self._min_rank = min(policy.min_rank, adapter.trained_rank)
        self._max_rank = min(policy.max_rank or adapter.trained_rank, adapter.trained_rank)
        self._skip_below = policy.skip_below if adapter.rungs[0] == 0 else 0.0
        self._rungs = adapter.rungs

    def select(self, complexity: float) -> RankChoice:
        """The choice for ``complexity`` in [0, 1]; its rung never falls when the complexity rises."""
        if complexity < self._skip_below:
            return self._choices[0]
        wanted = self._min_rank * (self._max_rank / self._min_rank) ** complexity
        # Rounding may carry a power just above its bound, where the next rung would be taken for nothing.
        index = bisect_left(self._rungs, min(wanted, self._max_rank))
        return self._choices[min(index, len(self._choices) - 1)]


def _energy_scale(kept: float, total: float, exponent: float) -> float:
    if kept <= 0.0 or exponent == 0.0:
        return 1.0
    return float((total / kept) ** (exponent / 2.0))

"""`LoraWeights` become a `RankLadder`: nested factors whose every prefix is the best approximation of that rank, and
the active rank of every module at every rung. It knows neither devices nor tensor parallelism nor tokens nor files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from chunkwise_adapters.format import InvalidRung, LoraWeights, ModuleKey
from chunkwise_adapters.sensitivity import Sensitivity
from chunkwise_adapters.whitening import Calibration, ShrinkMoments, plain, whitened

Allocation = Literal["uniform", "global"]
LadderKind = Literal["plain", "whitened", "sensitive"]


@dataclass(frozen=True, slots=True, eq=False)
class LadderModule:
    """``ΔW ≈ b_t[:k].T @ a[:k]`` for every active rank k up to the stored rank R = min(trained rank, in, out).

    ``a`` [R, in] and ``b_t`` [R, out] are contiguous fp32, so a prefix is one block of memory; the rows of ``b_t`` are
    orthonormal. ``singular_values`` [R] descend; cutting at rank k loses the sum of the squares from k on. In a plain
    ladder they are those of ``ΔW`` (the row norms of ``a``) and the loss is ``‖ΔW - ΔW_k‖²_F``; in a whitened one they
    are the root mean squares of ``a @ x`` on the calibration data and the loss is the mean ``‖ΔW x - ΔW_k x‖²``.
    ``sensitivity`` [R], fp32, never rises; only a sensitive ladder has it: what its ranks are worth on the calibration
    data, see `chunkwise_adapters.sensitivity`.
    """

    a: Tensor
    b_t: Tensor
    singular_values: Tensor
    sensitivity: Tensor | None = None

    @property
    def cost(self) -> int:
        """What one rank costs: in + out multiplications per token, and as many weights."""
        return self.a.shape[1] + self.b_t.shape[1]

    @property
    def worth(self) -> NDArray[np.float64]:
        """What global ranks compare, per rank [R]: the sensitivity, or else the energy that it keeps."""
        if self.sensitivity is not None:
            return self.sensitivity.double().numpy()
        return self.singular_values.double().numpy() ** 2


@dataclass(frozen=True, slots=True, eq=False)
class LadderInfo:
    """What is known of a ladder without its tensors.

    ``rungs`` ascend and end with ``trained_rank``. They are budgets of ranks per module; with global allocation they
    may be fractions (whole ones are ints, and print so). Parallel to them: ``kept_energy``, the share of the sum of all
    modules' squared singular values that the rung keeps (1 where they are all zero), and ``mean_active_rank``, the mean
    over the modules weighted by their cost: equal numbers are equal multiplications per token, and equal bytes.
    """

    name: str
    content_hash: str
    trained_rank: int
    rungs: tuple[float, ...]
    kept_energy: tuple[float, ...]
    mean_active_rank: tuple[float, ...]

    def rung_index(self, rung: float | None) -> int:
        """Position of ``rung`` in ``rungs``; None means the last, full rank. Raises InvalidRung for any other value."""
        if rung is None:
            return len(self.rungs) - 1
        try:
            return self.rungs.index(rung)
        except ValueError:
            raise InvalidRung(f"adapter {self.name!r} has no rung {rung:g}; its rungs are {self.rungs}") from None


@dataclass(frozen=True, slots=True, eq=False)
class RankLadder(LadderInfo):
    """An adapter as nested factors. ``active_ranks`` holds, per module, its active rank at each of the ``rungs``; it
    never falls from one rung to the next and reaches the stored rank at the last. ``calibration`` is what a whitened or
    sensitive ladder was fitted to, None in a plain one."""

    modules: dict[ModuleKey, LadderModule]
    active_ranks: dict[ModuleKey, tuple[int, ...]]
    allocation: Allocation = "uniform"
    calibration: Calibration | None = None

    @property
    def kind(self) -> LadderKind:
        """What orders the ranks: the weights alone ("plain"), or calibration data: inside a module by its output on
        them ("whitened"), or among the modules by their loss ("sensitive")."""
        if self.calibration is None:
            return "plain"
        sensitive = any(module.sensitivity is not None for module in self.modules.values())
        return "sensitive" if sensitive else "whitened"

    @property
    def truncation_errors(self) -> tuple[float, ...]:
        """Per rung, the sum over all modules of the squared singular values that it drops: ``Σ‖ΔW - ΔW_k‖²_F`` in a
        plain ladder, in a whitened one the mean over the calibration tokens of ``Σ‖ΔW x - ΔW_k x‖²``."""
        squares = {key: module.singular_values.double() ** 2 for key, module in self.modules.items()}
        return tuple(
            sum(float(squares[key][ranks[i] :].sum()) for key, ranks in self.active_ranks.items())
            for i in range(len(self.rungs))
        )


def build_ladder(
    weights: LoraWeights,
    rungs: Sequence[float] | None = None,
    allocation: Allocation = "uniform",
    fitted: ShrinkMoments | Sensitivity | None = None,
) -> RankLadder:
    """The ladder of an adapter: whitened with `ShrinkMoments`, sensitive with a `Sensitivity`, else plain.

    ``rungs`` are rank budgets per module; None takes 0 and the powers of two below the trained rank, with "global" from
    1/4 on. The trained rank itself is always the last rung. With "uniform" every module gets the budget; with "global"
    what that costs (`LadderModule.cost`) is spent where a unit of it is worth most, by squared singular value or
    sensitivity over cost, down to the rank at which the total comes nearest to it. That is the greedy order for a
    knapsack: no choice of ranks of the total's cost is worth more. A fraction is a budget for all modules together.

    Raises:
        InvalidRung: a rung below 0 or above the trained rank, or a fraction with "uniform".
        InvalidCalibration: ``fitted`` to another adapter, of no tokens, or not finite.
    """
    if fitted is not None:
        fitted.check(weights)
    modules: dict[ModuleKey, LadderModule] = {}
    for key, pair in weights.modules.items():
        moments = fitted.second[key] if isinstance(fitted, ShrinkMoments) else None
        worth = fitted.nested(key) if isinstance(fitted, Sensitivity) else None
        a, b_t, strength = plain(pair) if moments is None else whitened(pair, moments)
        modules[key] = LadderModule(a.float().contiguous(), b_t.float().contiguous(), strength.float(), worth)
    return assemble_ladder(weights, modules, rungs, allocation, None if fitted is None else fitted.calibration)


def assemble_ladder(
    weights: LoraWeights,
    modules: dict[ModuleKey, LadderModule],
    rungs: Sequence[float] | None,
    allocation: Allocation,
    calibration: Calibration | None,
) -> RankLadder:
    """The ladder of factors that are there already: only ranks and energies are computed. Raises InvalidRung."""
    resolved = _rungs(weights, rungs, allocation)
    spectra = [module.singular_values.double().numpy() for module in modules.values()]
    stored = np.array([len(spectrum) for spectrum in spectra])
    costs = np.array([module.cost for module in modules.values()])
    worth = [module.worth for module in modules.values()]
    active = _uniform(stored, resolved) if allocation == "uniform" else _global(worth, costs, resolved)
    energy = [np.concatenate(([0.0], np.cumsum(spectrum**2))) for spectrum in spectra]
    kept = [sum(float(e[k]) for e, k in zip(energy, ranks, strict=True)) for ranks in active]
    return RankLadder(
        name=weights.name,
        content_hash=weights.content_hash,
        trained_rank=weights.trained_rank,
        rungs=resolved,
        kept_energy=tuple(value / kept[-1] if kept[-1] > 0.0 else 1.0 for value in kept),
        mean_active_rank=tuple(float(ranks @ costs / costs.sum()) for ranks in active),
        modules=modules,
        active_ranks={key: tuple(int(ranks[i]) for ranks in active) for i, key in enumerate(modules)},
        allocation=allocation,
        calibration=calibration,
    )


def _rungs(weights: LoraWeights, rungs: Sequence[float] | None, allocation: Allocation) -> tuple[float, ...]:
    full = weights.trained_rank
    if rungs is None:
        # Two real adapters gained nine tenths of what they give below rank 1.
        below = (0.25, 0.5) if allocation == "global" else ()
        rungs = (0, *below, *(1 << i for i in range(full.bit_length()) if 1 << i < full))
    outside = [rung for rung in rungs if not 0 <= rung <= full]
    if outside:
        raise InvalidRung(f"adapter {weights.name!r}: rungs {outside} are outside 0..{full}, its trained rank")
    fractions = [rung for rung in rungs if not float(rung).is_integer()]
    if fractions and allocation == "uniform":
        raise InvalidRung(
            f"adapter {weights.name!r}: rungs {fractions} are fractions, and uniform ranks give every module the same "
            "whole rank; use global allocation, or whole rungs"
        )
    return tuple(sorted({int(rung) if float(rung).is_integer() else rung for rung in (*rungs, full)}))


def _uniform(stored: NDArray[np.intp], rungs: Sequence[float]) -> list[NDArray[np.intp]]:
    return [np.minimum(int(rung), stored) for rung in rungs]


def _global(
    worth: Sequence[NDArray[np.float64]], costs: NDArray[np.intp], rungs: Sequence[float]
) -> list[NDArray[np.intp]]:
    """Ranks from one order over those of all modules, so rungs are nested; ties go to the lower index, then module."""
    stored = np.array([len(one) for one in worth])
    module = np.repeat(np.arange(len(stored)), stored)
    index = np.concatenate([np.arange(rank) for rank in stored])
    owner = module[np.lexsort((module, index, -np.concatenate(worth) / costs[module]))]
    half_spent = np.cumsum(costs[owner]) - costs[owner] / 2.0
    budgets = [float((np.minimum(rung, stored) * costs).sum()) for rung in rungs]
    counts = [np.searchsorted(half_spent, budget, side="right") for budget in budgets]
    return [np.bincount(owner[:count], minlength=len(stored)) for count in counts]

"""`LoraWeights` become a `RankLadder`: nested factors whose every prefix is the best approximation of that rank, and
the active rank of every module at every rung. It knows neither devices nor tensor parallelism nor tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chunkwise_adapters.format import InvalidRung, LoraPair, LoraWeights, ModuleKey

Allocation = Literal["uniform", "global"]


@dataclass(frozen=True, slots=True, eq=False)
class LadderModule:
    """``ΔW ≈ b_t[:k].T @ a[:k]`` for every active rank k up to the stored rank R = min(trained rank, in, out).

    ``a`` [R, in] and ``b_t`` [R, out] are contiguous fp32, so a prefix is one block of memory; the rows of ``b_t`` are
    orthonormal, the row norms of ``a`` are the descending ``singular_values`` [R] of ``ΔW``.
    """

    a: Tensor
    b_t: Tensor
    singular_values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LadderInfo:
    """What is known of a ladder without its tensors.

    ``rungs`` ascend and end with ``trained_rank``. Parallel to them: ``kept_energy``, the share of ``Σ‖ΔW‖²_F`` over
    all modules that the rung keeps (1 for an adapter that is all zeros), and ``mean_active_rank`` over its modules.
    """

    name: str
    content_hash: str
    trained_rank: int
    rungs: tuple[int, ...]
    kept_energy: tuple[float, ...]
    mean_active_rank: tuple[float, ...]

    def rung_index(self, rung: int | None) -> int:
        """Position of ``rung`` in ``rungs``; None means the last, full rank. Raises InvalidRung for any other value."""
        if rung is None:
            return len(self.rungs) - 1
        try:
            return self.rungs.index(rung)
        except ValueError:
            raise InvalidRung(f"adapter {self.name!r} has no rung {rung}; its rungs are {self.rungs}") from None


@dataclass(frozen=True, slots=True, eq=False)
class RankLadder(LadderInfo):
    """An adapter as nested factors. ``active_ranks`` holds, per module, its active rank at each of the ``rungs``; it
    never falls from one rung to the next and reaches the stored rank at the last."""

    modules: dict[ModuleKey, LadderModule]
    active_ranks: dict[ModuleKey, tuple[int, ...]]


def build_ladder(
    weights: LoraWeights, rungs: Sequence[int] | None = None, allocation: Allocation = "uniform"
) -> RankLadder:
    """The plain SVD ladder of an adapter.

    ``rungs`` are rank budgets per module; None takes 0 and the powers of two below the trained rank. The trained rank
    itself is always the last rung. With "uniform" every module gets the budget; with "global" the same total goes to
    the largest singular values of all modules, which is the best truncation of the whole adapter in Frobenius norm.

    Raises:
        InvalidRung: a rung below 0 or above the trained rank.
    """
    resolved = _rungs(weights, rungs)
    modules = {key: _decompose(pair) for key, pair in weights.modules.items()}
    spectra = [module.singular_values.double().numpy() for module in modules.values()]
    stored = np.array([len(spectrum) for spectrum in spectra])
    active = _uniform(stored, resolved) if allocation == "uniform" else _global(spectra, stored, resolved)
    energy = [np.concatenate(([0.0], np.cumsum(spectrum**2))) for spectrum in spectra]
    kept = [sum(float(e[k]) for e, k in zip(energy, ranks, strict=True)) for ranks in active]
    return RankLadder(
        name=weights.name,
        content_hash=weights.content_hash,
        trained_rank=weights.trained_rank,
        rungs=resolved,
        kept_energy=tuple(value / kept[-1] if kept[-1] > 0.0 else 1.0 for value in kept),
        mean_active_rank=tuple(float(ranks.mean()) for ranks in active),
        modules=modules,
        active_ranks={key: tuple(int(ranks[i]) for ranks in active) for i, key in enumerate(modules)},
    )


def _rungs(weights: LoraWeights, rungs: Sequence[int] | None) -> tuple[int, ...]:
    full = weights.trained_rank
    if rungs is None:
        rungs = (0, *(1 << i for i in range(full.bit_length()) if 1 << i < full))
    outside = [rung for rung in rungs if not 0 <= rung <= full]
    if outside:
        raise InvalidRung(f"adapter {weights.name!r}: rungs {outside} are outside 0..{full}, its trained rank")
    return tuple(sorted({*rungs, full}))


def _decompose(pair: LoraPair) -> LadderModule:
    """Thin QR of B and Aᵀ, SVD of the core: ``s·B A = Q_b (s·R_b R_aᵀ) Q_aᵀ = (Q_b U) (S Vᵀ Q_aᵀ)``.

    In fp64, because rounding must not disturb the order of the small singular values; the largest matrix is d × r.
    """
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    u, s, v_h = torch.linalg.svd(pair.scale * (r_b @ r_a.T), full_matrices=False)
    return LadderModule(
        a=((s[:, None] * v_h) @ q_a.T).float().contiguous(),
        b_t=(q_b @ u).T.float().contiguous(),
        singular_values=s.float(),
    )


def _uniform(stored: NDArray[np.intp], rungs: Sequence[int]) -> list[NDArray[np.intp]]:
    return [np.minimum(rung, stored) for rung in rungs]


def _global(
    spectra: Sequence[NDArray[np.float64]], stored: NDArray[np.intp], rungs: Sequence[int]
) -> list[NDArray[np.intp]]:
    """Ranks from one order over all singular values, so rungs are nested; ties go to the lower index, then module."""
    module = np.repeat(np.arange(len(stored)), stored)
    index = np.concatenate([np.arange(rank) for rank in stored])
    owner = module[np.lexsort((module, index, -np.concatenate(spectra)))]
    totals = [int(np.minimum(rung, stored).sum()) for rung in rungs]
    return [np.bincount(owner[:total], minlength=len(stored)) for total in totals]

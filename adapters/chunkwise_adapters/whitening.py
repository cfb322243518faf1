"""One LoRA pair becomes nested factors, ordered by the weights alone or by what calibration data shows of them.

Both orders are rotations of one another, so full rank is the same update to rounding. It knows neither rungs nor files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chunkwise_adapters.errors import InvalidCalibration
from chunkwise_adapters.format import LoraPair, LoraWeights, ModuleKey


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a whitened ladder was fitted to: SHA-256 (hex) of the text, and how many of its tokens were run."""

    text_hash: str
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class ShrinkMoments:
    """Second moments of an adapter's shrink outputs ``h = A x`` over the calibration tokens.

    ``second`` holds, per module, the mean of ``h hᵀ`` [r, r] in fp64 with r the trained rank, for the factor A as
    trained (the scale is not in it). ``adapter_hash`` is the content hash of the adapter.
    """

    adapter_hash: str
    calibration: Calibration
    second: Mapping[ModuleKey, Tensor]

    def check(self, weights: LoraWeights) -> None:
        """Raises InvalidCalibration unless these are the moments of ``weights``, finite, over at least one token."""
        where = f"adapter {weights.name!r}"
        if self.adapter_hash != weights.content_hash:
            raise InvalidCalibration(
                f"{where}: the moments were gathered with the adapter of content {self.adapter_hash[:12]}, not "
                f"{weights.content_hash[:12]}; gather them again"
            )
        if self.calibration.tokens < 1:
            raise InvalidCalibration(f"{where}: the calibration text has no tokens; give a longer text")
        for key, pair in weights.modules.items():
            moment = self.second.get(key)
            expected = (pair.trained_rank, pair.trained_rank)
            if moment is None or tuple(moment.shape) != expected:
                shape = None if moment is None else tuple(moment.shape)
                raise InvalidCalibration(f"{where}, layer {key[0]} {key[1]}: moment {shape}; expected is {expected}")
            if not bool(torch.isfinite(moment).all()):
                raise InvalidCalibration(
                    f"{where}, layer {key[0]} {key[1]}: the shrink output is NaN or infinite on the calibration text; "
                    "run the model in a wider data type"
                )


class NestedFactors(NamedTuple):
    """``ΔW = b_t.T @ a`` in fp64: ``a`` [R, in], ``b_t`` [R, out] with orthonormal rows; ``strength`` [R] descends."""

    a: Tensor
    b_t: Tensor
    strength: Tensor


def plain(pair: LoraPair) -> NestedFactors:
    """Every prefix is the best approximation of ``ΔW`` of its rank; ``strength`` holds the singular values of ``ΔW``.

    Thin QR of B and Aᵀ, SVD of the core: ``s·B A = Q_b (s·R_b R_aᵀ) Q_aᵀ = (Q_b U) (S Vᵀ Q_aᵀ)``. In fp64, because
    rounding must not disturb the order of the small singular values; the largest matrix is d × r.
    """
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    u, s, v_h = torch.linalg.svd(pair.scale * (r_b @ r_a.T), full_matrices=False)
    return NestedFactors((s[:, None] * v_h) @ q_a.T, (q_b @ u).T, s)


def whitened(pair: LoraPair, second: Tensor) -> NestedFactors:
    """Every prefix is the best approximation of its rank of the *output* on the calibration data.

    ``second`` is ``G = E[h hᵀ]`` [r, r] of ``h = A x``. ``strength`` holds ``S``, the root mean squares of the output's
    coordinates: the mean of ``‖ΔW x - B'_k A'_k x‖²`` over the calibration tokens is ``Σ_{i>k} S_i²``, exactly.

    The design asks for ``R_b G^{1/2} = U S Vᵀ``, ``B' = Q_b U`` and ``A' = S Vᵀ G^{-1/2} A``. U is all that is needed:
    ``A' = Uᵀ (s·R_b) A`` without an inverse, so ``B'A' = s·B A`` holds for singular G too. U is found as the rotation
    that diagonalises the second moment of the plain ladder's shrink output. Directions that the data never shows have
    ``S = 0`` and come last, in the order of the plain ladder.
    """
    a, b_t, singular = plain(pair)
    # The plain A' is `to_plain @ A`: the rows of b_t are orthonormal and B'A' = s·B A.
    to_plain = pair.scale * (b_t @ pair.b.double())
    moment = to_plain @ second.double().to(to_plain.device) @ to_plain.T
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values, rotation = values.flip(0).clamp_min(0.0), vectors.flip(1)
    seen = int((values > len(values) * torch.finfo(torch.float64).eps * values[0]).sum())
    unseen = rotation[:, seen:]
    # A of the unseen directions is `unseenᵀ diag(S) Vᵀ Q_aᵀ`, of which the last two factors have orthonormal rows.
    u, _, _ = torch.linalg.svd(unseen.T * singular, full_matrices=False)
    rotation = torch.cat([rotation[:, :seen], unseen @ u], dim=1)
    strength = torch.cat([values[:seen].sqrt(), values.new_zeros(len(values) - seen)])
    return NestedFactors(rotation.T @ a, rotation.T @ b_t, strength)

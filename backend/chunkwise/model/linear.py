"""Projections: a base matrix, fused over the targets that share an input, plus gated LoRA on each target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.ops import GatedLora

_INT8_MAX = 127.0


@dataclass(frozen=True, slots=True)
class Matrix:
    """A base weight ``[out, in]``: ``data`` in the model's type or a smaller one with ``scales`` None, or int8 ``data``
    with one fp32 scale per row ``[out]``."""

    data: Tensor
    scales: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix in ``dtype``."""
        return self.data.to(dtype) if self.scales is None else (self.data * self.scales[:, None]).to(dtype)

    def times(self, x: Tensor) -> Tensor:
        """``x`` [T, in] times the transposed matrix, ``[T, out]``."""
        return F.linear(x, self.dense(x.dtype))

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` [T], ``[T, in]``."""
        rows = F.embedding(ids, self.data)
        return rows.to(dtype) if self.scales is None else (rows * F.embedding(ids, self.scales[:, None])).to(dtype)


def quantize_rows(weight: Tensor) -> Matrix:
    """``weight`` [out, in] in 8 bits, each row scaled by its largest magnitude; the error is at most half a scale."""
    scales = weight.float().abs().amax(dim=1).div_(_INT8_MAX)
    # A row of zeros has scale 0; dividing by 1 instead keeps it exactly zero.
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return Matrix(torch.round(weight.float() / safe[:, None]).clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scales)


@dataclass(frozen=True, slots=True)
class Projection:
    """Semantics: ``y = x Wᵀ + b``, then per target ``t`` of the fused output ``y[:, columns_t] += B_t (g ⊙ A_t x)``.

    ``weight`` is ``[out, in]`` of this rank, the targets' rows one after another; ``columns`` gives each target's
    range. In a row-parallel projection x holds this rank's columns, so the result is a partial sum, the adapter's part
    included: its shrink output is linear in x, and the base all-reduce adds both up.
    """

    layer: int
    weight: Matrix
    bias: Tensor | None
    columns: tuple[tuple[str, slice], ...]
    lora: GatedLora

    def forward(self, x: Tensor, segments: tuple[LoraSegment, ...]) -> Tensor:
        """``[T, in]`` to ``[T, out]``."""
        y = self.weight.times(x)
        if self.bias is not None:
            y += self.bias
        if segments:
            for target, columns in self.columns:
                self.lora(y[:, columns], x, segments, (self.layer, target))
        return y

"""Projections: a base matrix, fused over the targets that share an input, plus gated LoRA on each target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.ops import GatedLora

_INT8_MAX = 127.0
FOUR_BITS = torch.uint8
"""The type of a matrix in 4 bits: two numbers to a byte."""
GROUP = 32
"""Columns that share a scale in 4 bits."""
# Shares of a group's range that 4 bits are spread over: cutting its ends off a little may serve the other numbers
# better.
_RANGES = (1.0, 0.93, 0.86, 0.79)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A base weight ``[out, in]``.

    ``data`` is the weight in the model's type or a smaller one, with ``scales`` None; or int8 with one fp32 scale per
    row ``[out]``; or uint8 ``[out, ⌈in / 2⌉]``: byte i holds column 2i in its low and column 2i + 1 in its high bits.
    Such a number q stands for ``scale (q - 8) + middle``, with fp32 ``scales`` and fp16 ``middles`` ``[out, ⌈in /
    32⌉]``, one of each per row and `GROUP` columns, and ``width`` is ``in``.
    """

    data: Tensor
    scales: Tensor | None = None
    middles: Tensor | None = None
    width: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.data.shape[0], self.data.shape[1] if self.width is None else self.width

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix in ``dtype``."""
        return self._widen(slice(None), dtype)

    def times(self, x: Tensor) -> Tensor:
        """``x`` [T, in] times the transposed matrix, ``[T, out]``."""
        return F.linear(x, self.dense(x.dtype))

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``ids`` [T], ``[T, in]``."""
        return self._widen(ids, dtype)

    def _widen(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        data = self.data[rows]
        if self.scales is None:
            return data.to(dtype)
        if self.middles is None:
            return (data * self.scales[rows, None]).to(dtype)
        q = torch.stack((data & 15, data >> 4), dim=-1).flatten(1)[:, : self.width].float() - 8.0
        scales, middles = (
            part[rows].float().repeat_interleave(GROUP, dim=1)[:, : self.width] for part in (self.scales, self.middles)
        )
        return (q * scales + middles).to(dtype)


def empty_matrix(
    rows: int, columns: int, storage: torch.dtype, allocate: Callable[[int, int, torch.dtype], Tensor]
) -> Matrix:
    """A `Matrix` of that size in ``storage``, not initialised: a floating type, int8 or `FOUR_BITS`. ``allocate`` makes
    its ``data``."""
    if storage == FOUR_BITS:
        data, groups = allocate(rows, -(-columns // 2), storage), (rows, -(-columns // GROUP))
        middles = torch.empty(groups, dtype=torch.float16, device=data.device)
        return Matrix(data, torch.empty(groups, device=data.device), middles, columns)
    data = allocate(rows, columns, storage)
    return Matrix(data, torch.empty(rows, device=data.device) if storage == torch.int8 else None)


def store_matrix(weight: Tensor, storage: torch.dtype) -> Matrix:
    """``weight`` [out, in] as it is kept in ``storage``; see `empty_matrix`."""
    if storage == FOUR_BITS:
        return quantize_groups(weight)
    return quantize_rows(weight) if storage == torch.int8 else Matrix(weight.to(storage))


def quantize_rows(weight: Tensor) -> Matrix:
    """``weight`` [out, in] in 8 bits, each row scaled by its largest magnitude; the error is at most half a scale."""
    scales = weight.float().abs().amax(dim=1).div_(_INT8_MAX)
    # A row of zeros has scale 0; dividing by 1 instead keeps it exactly zero.
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return Matrix(torch.round(weight.float() / safe[:, None]).clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scales)


def quantize_groups(weight: Tensor) -> Matrix:
    """``weight`` [out, in] in 4 bits, each row's `GROUP` columns spread over a range of their own: of a few the one
    with the least squared error."""
    rows, columns = weight.shape
    # The last column, repeated, leaves the last group's range as it is.
    padded = F.pad(weight.float()[:, None], (0, -columns % GROUP), mode="replicate")
    groups = padded.view(rows, -1, GROUP)
    low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    best, scales, middles = torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low)
    q = torch.zeros_like(groups)
    for share in _RANGES:
        scale = (high - low) * (share / 15.0)
        # As it will be stored. The numbers reach from 8 scales below to 7 above.
        middle = ((low + high + scale) / 2.0).half().float()
        tried = torch.round((groups - middle) / torch.where(scale > 0.0, scale, 1.0)).clamp_(-8.0, 7.0)
        error = (tried * scale + middle - groups).square_().sum(dim=2, keepdim=True)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        middles, q = torch.where(better, middle, middles), torch.where(better, tried, q)
    nibbles = (q + 8.0).to(torch.uint8).view(rows, -1)[:, : columns + columns % 2]
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return Matrix(packed, scales.squeeze(2), middles.squeeze(2).half(), columns)


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

"""Projections: a base matrix, fused over the targets that share an input, plus gated LoRA on each target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.ops import GatedLora

Product = Callable[[Tensor, Tensor], Tensor]
"""(x [T, in], weight [out, in]) -> x weightᵀ [T, out], contiguous."""

# Most rows for which `skinny_product` is the faster one; measured, see there.
_SKINNY_ROWS = 8


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """Semantics: ``x weightᵀ``."""
    return F.linear(x, weight)


def skinny_product(x: Tensor, weight: Tensor) -> Tensor:
    """Semantics: ``x weightᵀ`` for few rows, computed as ``(weight xᵀ)ᵀ``.

    For two to eight rows of fp32 the CPU library takes longer in the other form, most so at two, and from about twelve
    on there is no difference. One row is the exception and is run as two. `scripts/bench_products` measures both.
    """
    rows = x.shape[0]
    if rows > _SKINNY_ROWS:
        return F.linear(x, weight)
    # repeat, not expand: a row of stride 0 would take the slow way again.
    padded = x.repeat(2, 1) if rows == 1 else x
    return torch.mm(weight, padded.t()).t()[:rows].contiguous()


def choose_product(device: torch.device, dtype: torch.dtype) -> Product:
    """The faster product on this device and type."""
    return skinny_product if device.type == "cpu" and dtype == torch.float32 else plain_product


@dataclass(frozen=True, slots=True)
class Projection:
    """Semantics: ``y = x Wᵀ + b``, then per target ``t`` of the fused output ``y[:, columns_t] += B_t (g ⊙ A_t x)``.

    ``weight`` is ``[out, in]`` of this rank, the targets' rows one after another; ``columns`` gives each target's
    range. In a row-parallel projection x holds this rank's columns, so the result is a partial sum, the adapter's part
    included: its shrink output is linear in x, and the base all-reduce adds both up.
    """

    layer: int
    weight: Tensor
    bias: Tensor | None
    columns: tuple[tuple[str, slice], ...]
    product: Product
    lora: GatedLora

    def forward(self, x: Tensor, segments: tuple[LoraSegment, ...]) -> Tensor:
        """``[T, in]`` to ``[T, out]``."""
        y = self.product(x, self.weight)
        if self.bias is not None:
            y += self.bias
        if segments:
            for target, columns in self.columns:
                self.lora(y[:, columns], x, segments, (self.layer, target))
        return y

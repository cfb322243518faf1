"""Projections: a base matrix, fused over the targets that share an input, plus gated LoRA on each target."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.ops import GatedLora


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
    lora: GatedLora

    def forward(self, x: Tensor, segments: tuple[LoraSegment, ...]) -> Tensor:
        """``[T, in]`` to ``[T, out]``."""
        y = F.linear(x, self.weight, self.bias)
        if segments:
            for target, columns in self.columns:
                self.lora(y[:, columns], x, segments, (self.layer, target))
        return y

"""The gated LoRA update ``y_t += B' (g_t ⊙ (A' x_t))``, one signature, chosen by what the device can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chunkwise_adapters.format import ModuleKey
from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.ops import cpu

__all__ = ["GatedLora", "choose_op"]

GatedLora = Callable[[Tensor, Tensor, Sequence[LoraSegment], ModuleKey], None]
"""(y, x, segments, key): adds to y in place."""


def choose_op(device: torch.device) -> GatedLora:
    """The fastest version that runs on ``device``. The grouped torch version runs on every device."""
    return cpu.gated_lora_

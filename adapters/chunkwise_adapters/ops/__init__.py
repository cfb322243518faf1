"""The gated LoRA update ``y_t += B' (g_t ⊙ (A' x_t))``, one signature, chosen by what the device can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from chunkwise_adapters.format import ModuleKey
from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.ops import cpu

__all__ = ["GatedLora", "choose_op"]

GatedLora = Callable[[Tensor, Tensor, Sequence[LoraSegment], ModuleKey], None]
"""(y, x, segments, key): adds to y in place."""


def choose_op(device: torch.device) -> GatedLora:
    """The fastest version that runs on ``device``: Triton's on a CUDA device where it is installed, else the grouped
    torch version, which runs on every device."""
    if device.type == "cuda" and find_spec("triton") is not None:
        op: GatedLora = import_module("chunkwise_adapters.ops.triton").TritonLora(device)
        return op
    return cpu.gated_lora_

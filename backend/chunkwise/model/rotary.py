"""Rotary position embedding (RoFormer, arXiv 2104.09864) with linear and llama3 frequency scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chunkwise.model.spec import ModelSpec, RopeScaling


def _scaled(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """``frequencies`` in radians per token. llama3 stretches long wavelengths by ``factor``, keeps short ones, and
    blends in between (Llama 3.1 model card; transformers `_compute_llama3_parameters`)."""
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    cycles = scaling.original_max_position / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((cycles - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


class Rotary:
    """Tables of cos and sin for all positions of the model, ``[max_position, head_dim]`` in fp32, built once."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
        frequencies = _scaled(1.0 / spec.rope_theta**exponents, spec.rope_scaling)
        angles = torch.outer(torch.arange(spec.max_position, dtype=torch.float32), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin at ``positions`` [T], each ``[T, 1, head_dim]``; one look-up serves all layers of a step."""
        return self.cos[positions][:, None].to(dtype), self.sin[positions][:, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x`` [T, heads, head_dim]: the halves of a head are the two coordinates (Hugging Face's layout)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin

"""Storage formats of KV pages: 8-bit keys with one scale per channel, 8-bit values with one scale per token.

Keys have few channels of large magnitude, values have not, hence the two axes (KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

import torch
from torch import Tensor

_INT8_MAX = 127.0


def _quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(dim=dim, keepdim=True).div_(_INT8_MAX)
    # A run of zeros has scale 0; dividing by 1 instead keeps it exactly zero.
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(x.float() / safe).clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale.squeeze(dim)


def quantize_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Semantics: ``keys ≈ q * scale`` with one scale per page, head and channel.

    Args:
        keys: ``[..., heads, page, dim]``.

    Returns:
        ``q`` int8 of the same shape, and ``scale`` fp32 ``[..., heads, dim]``. The error is at most half a scale.
    """
    return _quantize(keys, dim=-2)


def quantize_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """Semantics: ``values ≈ q * scale`` with one scale per token and head.

    Args:
        values: ``[..., heads, page, dim]``.

    Returns:
        ``q`` int8 of the same shape, and ``scale`` fp32 ``[..., heads, page]``. The error is at most half a scale.
    """
    return _quantize(values, dim=-1)


def dequantize_keys(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_keys` up to rounding."""
    return (q * scale.unsqueeze(-2)).to(dtype)


def dequantize_values(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_values` up to rounding."""
    return (q * scale.unsqueeze(-1)).to(dtype)

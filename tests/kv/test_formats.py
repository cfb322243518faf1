"""Small integers against an independent reading of their definition, number by number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.kv.formats import (
    dequantize_int4,
    dequantize_int8,
    pack_int4,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)

KEYS, VALUES = -2, -1


def _random(seed: int, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(seed)) * scale + offset


@pytest.mark.parametrize("dim", [KEYS, VALUES])
@given(seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e6), offset=st.floats(-1e3, 1e3))
def test_errors_stay_within_half_a_step(dim: int, seed: int, scale: float, offset: float) -> None:
    x = _random(seed, scale, offset)
    q, step = quantize_int8(x, dim)
    error = (dequantize_int8(q, step, dim, torch.float32) - x).abs()
    assert (error <= step.unsqueeze(dim) / 2 + x.abs() * 1e-6).all()
    packed, step, middle = quantize_int4(x, dim)
    assert packed.shape == (3, 2, 4, 3)
    error = (dequantize_int4(packed, step, middle, dim, torch.float32) - x).abs()
    assert (error <= step.float().unsqueeze(dim) / 2 + x.abs() * 1e-6).all()
    spread = x.amax(dim) - x.amin(dim)
    assert (step.float() <= spread / 15 * 1.01 + middle.float().abs() * 2**-9).all(), "no level is wasted"


@pytest.mark.parametrize("dim", [KEYS, VALUES])
def test_four_bits_number_by_number(dim: int) -> None:
    x = _random(1, 3.0, 2.0)
    packed, step, middle = quantize_int4(x, dim)
    got = dequantize_int4(packed, step, middle, dim, torch.float32)
    for place in ((0, 0, 0, 0), (1, 1, 2, 4), (2, 0, 3, 2), (0, 1, 1, 5)):
        *outer, column = place
        byte = int(packed[(*outer, column % 3)])
        level = byte >> 4 if column >= 3 else byte & 15
        shared = tuple(value for axis, value in enumerate(place) if axis != dim % 4)
        want = float(middle[shared]) + (level - 7.5) * float(step[shared])
        assert float(got[place]) == pytest.approx(want, rel=1e-5)


def test_packing_keeps_every_level() -> None:
    q = torch.arange(16, dtype=torch.uint8).repeat(2, 2)[:, torch.randperm(32)]
    assert torch.equal(unpack_int4(pack_int4(q)), q)
    assert pack_int4(q).shape == (2, 16)


def test_zeros_and_lone_extremes_are_kept() -> None:
    x = torch.zeros(2, 4, 3, 8)
    x[0, 1, 2, 3] = 5.0
    x[1, 0, 0, 0] = -7.0
    for dim in (KEYS, VALUES):
        assert torch.allclose(dequantize_int8(*quantize_int8(x, dim), dim, torch.float32), x, atol=1e-6)
        packed, step, middle = quantize_int4(x, dim)
        got = dequantize_int4(packed, step, middle, dim, torch.float32)
        assert torch.allclose(got, x, atol=0.05)
        alone = (x == 0).all(dim=dim, keepdim=True).expand_as(x)
        assert not got[alone].any()


def test_what_is_not_finite_stays_visible() -> None:
    for value in (float("nan"), float("inf")):
        x = torch.ones(1, 1, 4, 4)
        x[0, 0, 1, 2] = value
        for dim in (KEYS, VALUES):
            assert not dequantize_int8(*quantize_int8(x, dim), dim, torch.float32).isfinite().all()
            packed, step, middle = quantize_int4(x, dim)
            assert not dequantize_int4(packed, step, middle, dim, torch.float32).isfinite().all()

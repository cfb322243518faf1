"""The small inner loops against numpy in fp64: at each size, and on guarded memory."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkwise.model.kernels.compile import entry
from chunkwise.model.kernels.tiles import atomic_add, atomic_load, exp_sum, silu_multiply
from chunkwise.model.kernels.vector import LANES
from guarded import GUARD, memory_end

Floats = NDArray[np.float32]


@entry
def run_exp_sum(scores, n, shift):
    return exp_sum(scores, n, shift)


@entry
def run_silu_multiply(gate, up, y, n):
    silu_multiply(gate, up, y, n)


@entry
def run_atomics(where, amount):
    return atomic_add(where, amount), atomic_load(where)


def exponentials(scores: Floats, shift: float) -> tuple[Floats, float]:
    """``s`` and the sum that `exp_sum` makes of it, checked to have written nothing else."""
    y = np.concatenate(([GUARD], scores, [GUARD] * (LANES + 1))).astype(np.float32)
    kept = np.array([shift], dtype=np.float32)
    total = run_exp_sum(y.ctypes.data + 4, len(scores), kept.ctypes.data)
    assert y[0] == GUARD and (y[1 + len(scores) :] == GUARD).all()
    return y[1 : 1 + len(scores)], total


def test_exp_is_right_to_about_two_units_over_its_whole_range() -> None:
    x = np.concatenate(
        (np.linspace(-87.0, 88.0, 200_001), np.linspace(-1e-3, 1e-3, 1001), [0.0, -0.0, 1e-40, -1e-40])
    ).astype(np.float32)
    got, _ = exponentials(x, 0.0)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(got - exact) <= 2.5 * np.spacing(exact.astype(np.float32))).all()
    assert got[np.flatnonzero(x == 0)].tolist() == [1.0] * int((x == 0).sum())


def test_exp_stops_at_its_bounds_and_keeps_nan() -> None:
    x = np.array([-np.inf, -1e30, -87.5, np.inf, 1e30, 88.5, np.nan, 1.0] * LANES, dtype=np.float32)[:-1]
    got, total = exponentials(x, 0.0)
    low, high = np.exp(np.float64(-87.0)), np.exp(np.float64(88.0))
    np.testing.assert_allclose(got[:7], [low, low, low, high, high, high, np.nan], rtol=3e-7)
    assert np.array_equal(np.isnan(got), np.isnan(x)) and np.isnan(total)
    assert np.isnan(exponentials(np.array([np.inf], dtype=np.float32), np.inf)[0]).all()


@pytest.mark.parametrize("n", [*range(2 * LANES + 2), 100, 127, 128])
def test_exp_sum_writes_n_numbers_and_returns_their_sum(n: int) -> None:
    scores = np.random.default_rng(n).standard_normal(n, dtype=np.float32) * 5
    shift = float(scores.max(initial=0.0))
    got, total = exponentials(scores, shift)
    np.testing.assert_allclose(got, np.exp((scores - np.float32(shift)).astype(np.float64)), rtol=1e-6)
    np.testing.assert_allclose(total, got.astype(np.float64).sum(), rtol=1e-6)


def silu(gate: Floats, up: Floats) -> Floats:
    """What `silu_multiply` makes of it, checked to have written nothing else."""
    y = np.full(len(gate) + LANES + 2, GUARD)
    run_silu_multiply(gate.ctypes.data, up.ctypes.data, y.ctypes.data + 4, len(gate))
    assert y[0] == GUARD and (y[1 + len(gate) :] == GUARD).all()
    return y[1 : 1 + len(gate)]


@pytest.mark.parametrize("n", [*range(2 * LANES + 2), 101, 1537])
def test_silu_multiply_equals_fp64(n: int) -> None:
    generator = np.random.default_rng(n)
    gate, up = (generator.standard_normal(n, dtype=np.float32) * 30 for _ in range(2))
    exact = gate.astype(np.float64) / (1.0 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(silu(gate, up), exact, rtol=2e-6, atol=1e-30)


def test_silu_multiply_far_out_and_not_finite() -> None:
    gate = np.array([-200.0, -1e4, 200.0, 1e4, np.inf, np.nan, -np.inf, 1.0, 1.0], dtype=np.float32)
    up = np.array([3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, np.nan, np.inf], dtype=np.float32)
    got = silu(gate, up)
    np.testing.assert_allclose(got[:4], [0.0, 0.0, 600.0, 3e4], rtol=1e-6, atol=1e-30)
    assert not np.isfinite(got[4:]).any(), "what is not finite must stay visible"


def test_masked_ends_touch_nothing_behind_them() -> None:
    end, scale = memory_end(), np.zeros(1, dtype=np.float32)
    for n in (1, LANES - 1, LANES + 1, 2 * LANES + 3):
        run_exp_sum(end - 4 * n, n, scale.ctypes.data)
        run_silu_multiply(end - 4 * n, end - 4 * n, end - 4 * n, n)


def test_atomics() -> None:
    where = np.array([2**40, -7, 99], dtype=np.int64)
    assert run_atomics(where.ctypes.data + 8, 5) == (-7, -2)
    assert run_atomics(where.ctypes.data + 8, -(2**35)) == (-2, -2 - 2**35)
    assert where.tolist() == [2**40, -2 - 2**35, 99]

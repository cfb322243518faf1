"""Every inner loop against numpy in fp64: at each size, on guarded memory, and to the same bits whatever the tile."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkwise.model.kernels.compile import entry
from chunkwise.model.kernels.tiles import (
    FLOAT_WEIGHT_ROWS,
    INT_WEIGHT_ROWS,
    ROWS,
    STRIP,
    atomic_add,
    atomic_load,
    dot_tile,
    dot_tile_int4,
    dot_tile_int8,
    exp_sum,
    expand_tile,
    largest_activation,
    silu_multiply,
)
from chunkwise.model.kernels.vector import LANES

Floats = NDArray[np.float32]

GUARD = np.float32(-12345.0)
SIZES = sorted({1, 2, LANES - 1, LANES, LANES + 1, 2 * LANES, 2 * LANES + 1, 40, 101, 576, 1541})
TILES = list(product((1, FLOAT_WEIGHT_ROWS), range(1, ROWS + 1)))
INT_TILES = list(product((1, INT_WEIGHT_ROWS), range(1, ROWS + 1)))

_dot_1_1, _dot_1_2, _dot_1_3, _dot_1_4 = (dot_tile(1, rows) for rows in range(1, 5))
_dot_n_1, _dot_n_2, _dot_n_3, _dot_n_4 = (dot_tile(FLOAT_WEIGHT_ROWS, rows) for rows in range(1, 5))
_half_1_1, _half_1_2, _half_1_3, _half_1_4 = (dot_tile(1, rows, bfloat16=True) for rows in range(1, 5))
_half_n_1, _half_n_2, _half_n_3, _half_n_4 = (dot_tile(FLOAT_WEIGHT_ROWS, rows, bfloat16=True) for rows in range(1, 5))
_int8_1_1, _int8_1_2, _int8_1_3, _int8_1_4 = (dot_tile_int8(1, rows) for rows in range(1, 5))
_int8_n_1, _int8_n_2, _int8_n_3, _int8_n_4 = (dot_tile_int8(INT_WEIGHT_ROWS, rows) for rows in range(1, 5))
_int4_1_1, _int4_1_2, _int4_1_3, _int4_1_4 = (dot_tile_int4(1, rows) for rows in range(1, 5))
_int4_n_1, _int4_n_2, _int4_n_3, _int4_n_4 = (dot_tile_int4(INT_WEIGHT_ROWS, rows) for rows in range(1, 5))
_wide_1, _wide_2, _wide_3, _wide_4 = (expand_tile(4, rows) for rows in range(1, 5))
_narrow_1, _narrow_2, _narrow_3, _narrow_4 = (expand_tile(1, rows) for rows in range(1, 5))
_rest_1, _rest_2, _rest_3, _rest_4 = (expand_tile(0, rows) for rows in range(1, 5))


@entry
def run_dot(weight_rows, rows, w, ldw, x, ldx, k, y, ldy):
    if weight_rows == 1:
        if rows == 1:
            _dot_1_1(w, ldw, x, ldx, k, y, ldy, ldw)
        elif rows == 2:
            _dot_1_2(w, ldw, x, ldx, k, y, ldy, ldw)
        elif rows == 3:
            _dot_1_3(w, ldw, x, ldx, k, y, ldy, ldw)
        else:
            _dot_1_4(w, ldw, x, ldx, k, y, ldy, ldw)
    elif rows == 1:
        _dot_n_1(w, ldw, x, ldx, k, y, ldy, ldw)
    elif rows == 2:
        _dot_n_2(w, ldw, x, ldx, k, y, ldy, ldw)
    elif rows == 3:
        _dot_n_3(w, ldw, x, ldx, k, y, ldy, ldw)
    else:
        _dot_n_4(w, ldw, x, ldx, k, y, ldy, ldw)


@entry
def run_dot_bfloat16(weight_rows, rows, w, ldw, x, ldx, k, y, ldy):
    if weight_rows == 1:
        if rows == 1:
            _half_1_1(w, ldw, x, ldx, k, y, ldy, ldw)
        elif rows == 2:
            _half_1_2(w, ldw, x, ldx, k, y, ldy, ldw)
        elif rows == 3:
            _half_1_3(w, ldw, x, ldx, k, y, ldy, ldw)
        else:
            _half_1_4(w, ldw, x, ldx, k, y, ldy, ldw)
    elif rows == 1:
        _half_n_1(w, ldw, x, ldx, k, y, ldy, ldw)
    elif rows == 2:
        _half_n_2(w, ldw, x, ldx, k, y, ldy, ldw)
    elif rows == 3:
        _half_n_3(w, ldw, x, ldx, k, y, ldy, ldw)
    else:
        _half_n_4(w, ldw, x, ldx, k, y, ldy, ldw)


@entry
def run_dot_int8(weight_rows, rows, w, ldw, x, ldx, k, y, ldy, ws, xs):
    if weight_rows == 1:
        if rows == 1:
            _int8_1_1(w, ldw, x, ldx, k, y, ldy, ws, xs, ldw)
        elif rows == 2:
            _int8_1_2(w, ldw, x, ldx, k, y, ldy, ws, xs, ldw)
        elif rows == 3:
            _int8_1_3(w, ldw, x, ldx, k, y, ldy, ws, xs, ldw)
        else:
            _int8_1_4(w, ldw, x, ldx, k, y, ldy, ws, xs, ldw)
    elif rows == 1:
        _int8_n_1(w, ldw, x, ldx, k, y, ldy, ws, xs, ldw)
    elif rows == 2:
        _int8_n_2(w, ldw, x, ldx, k, y, ldy, ws, xs, ldw)
    elif rows == 3:
        _int8_n_3(w, ldw, x, ldx, k, y, ldy, ws, xs, ldw)
    else:
        _int8_n_4(w, ldw, x, ldx, k, y, ldy, ws, xs, ldw)


@entry
def run_dot_int4(weight_rows, rows, w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups):
    if weight_rows == 1:
        if rows == 1:
            _int4_1_1(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ldw)
        elif rows == 2:
            _int4_1_2(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ldw)
        elif rows == 3:
            _int4_1_3(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ldw)
        else:
            _int4_1_4(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ldw)
    elif rows == 1:
        _int4_n_1(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ldw)
    elif rows == 2:
        _int4_n_2(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ldw)
    elif rows == 3:
        _int4_n_3(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ldw)
    else:
        _int4_n_4(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ldw)


@entry
def run_expand(vectors, rows, h, ldh, m, ldm, k, y, ldy, columns):
    if vectors == 4:
        if rows == 1:
            _wide_1(h, ldh, m, ldm, k, y, ldy, columns)
        elif rows == 2:
            _wide_2(h, ldh, m, ldm, k, y, ldy, columns)
        elif rows == 3:
            _wide_3(h, ldh, m, ldm, k, y, ldy, columns)
        else:
            _wide_4(h, ldh, m, ldm, k, y, ldy, columns)
    elif vectors == 1:
        if rows == 1:
            _narrow_1(h, ldh, m, ldm, k, y, ldy, columns)
        elif rows == 2:
            _narrow_2(h, ldh, m, ldm, k, y, ldy, columns)
        elif rows == 3:
            _narrow_3(h, ldh, m, ldm, k, y, ldy, columns)
        else:
            _narrow_4(h, ldh, m, ldm, k, y, ldy, columns)
    elif rows == 1:
        _rest_1(h, ldh, m, ldm, k, y, ldy, columns)
    elif rows == 2:
        _rest_2(h, ldh, m, ldm, k, y, ldy, columns)
    elif rows == 3:
        _rest_3(h, ldh, m, ldm, k, y, ldy, columns)
    else:
        _rest_4(h, ldh, m, ldm, k, y, ldy, columns)


@entry
def run_exp_sum(scores, n, shift):
    return exp_sum(scores, n, shift)


@entry
def run_silu_multiply(gate, up, y, n):
    silu_multiply(gate, up, y, n)


@entry
def run_atomics(where, amount):
    return atomic_add(where, amount), atomic_load(where)


def padded(rows: int, k: int, seed: int) -> Floats:
    """``[rows, k + 3]`` random numbers; what lies beyond k is NaN, so that one read of it spoils a sum."""
    x = np.full((rows, k + 3), np.nan, dtype=np.float32)
    x[:, :k] = np.random.default_rng(seed).standard_normal((rows, k))
    return x


def dot(weight_rows: int, rows: int, w: Floats | NDArray[np.uint16], x: Floats, k: int) -> Floats:
    """``y`` [rows, weight_rows] of one tile, checked to have written nothing else; ``w`` of 16 bits is bfloat16."""
    y = np.full((rows + 1, weight_rows + 2), GUARD)
    run = run_dot_bfloat16 if w.dtype == np.uint16 else run_dot
    run(weight_rows, rows, w.ctypes.data, w.shape[1], x.ctypes.data, x.shape[1], k, y.ctypes.data, y.shape[1])
    assert (y[rows:] == GUARD).all() and (y[:, weight_rows:] == GUARD).all()
    return y[:rows, :weight_rows]


@pytest.mark.parametrize("k", SIZES)
def test_dot_equals_fp64(k: int) -> None:
    w, x = padded(FLOAT_WEIGHT_ROWS, k, 1), padded(ROWS, k, 2)
    exact = x[:, :k].astype(np.float64) @ w[:, :k].T.astype(np.float64)
    size = np.abs(x[:, :k]) @ np.abs(w[:, :k]).T
    for weight_rows, rows in TILES:
        error = np.abs(dot(weight_rows, rows, w, x, k) - exact[:rows, :weight_rows])
        assert (error <= 2e-7 * (8 + k / LANES) * size[:rows, :weight_rows]).all(), (weight_rows, rows)


@pytest.mark.parametrize("k", SIZES)
def test_a_dot_has_the_same_bits_in_every_tile_and_at_every_address(k: int) -> None:
    w, x = padded(FLOAT_WEIGHT_ROWS, k, 3), padded(ROWS, k, 4)
    alone = np.array([[dot(1, 1, w[n:], x[t:], k)[0, 0] for n in range(FLOAT_WEIGHT_ROWS)] for t in range(ROWS)])
    for weight_rows, rows in TILES:
        assert np.array_equal(dot(weight_rows, rows, w, x, k), alone[:rows, :weight_rows]), (weight_rows, rows)
    wider_w, wider_x = padded(FLOAT_WEIGHT_ROWS, k + 5, 3), padded(ROWS, k + 5, 4)
    wider_w[:, :k], wider_x[:, :k] = w[:, :k], x[:, :k]
    assert np.array_equal(dot(FLOAT_WEIGHT_ROWS, ROWS, wider_w, wider_x, k), alone)


@pytest.mark.parametrize("k", SIZES)
def test_a_bfloat16_dot_has_the_bits_of_the_same_numbers_in_fp32(k: int) -> None:
    bits = np.random.default_rng(k).integers(0, 2**16, (FLOAT_WEIGHT_ROWS, k + 3)).astype(np.uint16)
    # All numbers below 2^16, of both signs, tiny ones among them; what lies beyond k is NaN.
    bits[:, :k] &= 0xC7FF
    bits[:, k:] = 0x7FC0
    w, x = (bits.astype(np.uint32) << 16).view(np.float32), padded(ROWS, k, 6)
    want = dot(FLOAT_WEIGHT_ROWS, ROWS, w, x, k)
    assert np.isfinite(want).all()
    for weight_rows, rows in TILES:
        assert np.array_equal(dot(weight_rows, rows, bits, x, k), want[:rows, :weight_rows]), (weight_rows, rows)


def dot_int8(
    weight_rows: int, rows: int, w: NDArray[np.int8], x: NDArray[np.int16], k: int, ws: Floats, xs: Floats
) -> Floats:
    """As `dot`."""
    y = np.full((rows + 1, weight_rows + 2), GUARD)
    scales = ws.ctypes.data, xs.ctypes.data
    at = w.ctypes.data, w.shape[1], x.ctypes.data, x.shape[1]
    run_dot_int8(weight_rows, rows, *at, k, y.ctypes.data, y.shape[1], *scales)
    assert (y[rows:] == GUARD).all() and (y[:, weight_rows:] == GUARD).all()
    return y[:rows, :weight_rows]


def _extremes(k: int, weight_rows: int, rows: int) -> Iterator[tuple[NDArray[np.int8], NDArray[np.int16]]]:
    """Weights and activations, padded with the largest numbers, that drive lanes as far as they can go."""
    most = largest_activation(k)
    signs = np.where(np.arange(k) % 2, 1, -1)
    one_lane = np.where(np.arange(k) % (2 * LANES) < 2, 1, 0)
    generator = np.random.default_rng(k)
    for pattern in (np.ones(k), -np.ones(k), signs, one_lane, generator.choice((-1, 1), k)):
        w, x = np.full((weight_rows, k + 3), 127, np.int8), np.full((rows, k + 3), 32767, np.int16)
        w[:, :k], x[:, :k] = 127, most * pattern
        yield w, x
    w[:, :k] = generator.integers(-127, 128, (weight_rows, k))
    x[:, :k] = generator.integers(-most, most + 1, (rows, k))
    yield w, x


@pytest.mark.parametrize("k", [*SIZES, 11008, 53248])
def test_int8_dot_never_overflows(k: int) -> None:
    ws = np.array([1.0, 0.5, 3e-3, 0.0], dtype=np.float32)[:INT_WEIGHT_ROWS]
    xs = np.array([1.0, 2.0, 7e-5, 1e-3], dtype=np.float32)
    for w, x in _extremes(k, INT_WEIGHT_ROWS, ROWS):
        products = x[:, None, :k].astype(np.int64) * w[None, :, :k]
        scales = xs[:, None].astype(np.float64) * ws
        exact, size = products.sum(-1) * scales, np.abs(products).sum(-1) * scales
        for weight_rows, rows in INT_TILES:
            got = dot_int8(weight_rows, rows, w, x, k, ws, xs)
            assert (np.abs(got - exact[:rows, :weight_rows]) <= 1e-6 * size[:rows, :weight_rows]).all()


@pytest.mark.parametrize("k", SIZES)
def test_int8_dot_is_exact_where_fp32_can_hold_it_and_the_same_bits_in_every_tile(k: int) -> None:
    generator = np.random.default_rng(k)
    w = np.full((INT_WEIGHT_ROWS, k + 3), 127, np.int8)
    x = np.full((ROWS, k + 3), 32767, np.int16)
    w[:, :k], x[:, :k] = generator.integers(-127, 128, (INT_WEIGHT_ROWS, k)), generator.integers(-60, 61, (ROWS, k))
    ones = np.ones(ROWS, dtype=np.float32)
    exact = x[:, :k].astype(np.int64) @ w[:, :k].T.astype(np.int64)
    ws, xs = (generator.random(ROWS, dtype=np.float32) for _ in range(2))
    alone = np.array(
        [[dot_int8(1, 1, w[n:], x[t:], k, ws[n:], xs[t:])[0, 0] for n in range(INT_WEIGHT_ROWS)] for t in range(ROWS)]
    )
    for weight_rows, rows in INT_TILES:
        got = dot_int8(weight_rows, rows, w, x, k, ones, ones)
        assert np.array_equal(got, exact[:rows, :weight_rows].astype(np.float32))
        assert np.array_equal(dot_int8(weight_rows, rows, w, x, k, ws, xs), alone[:rows, :weight_rows])


class Four(NamedTuple):
    """Weights of 4 bits, two to a byte, their scales and middles, and the scales and group sums of x."""

    w: NDArray[np.uint8]
    scales: Floats
    middles: NDArray[np.float16]
    x_scales: Floats
    sums: Floats

    def from_row(self, n: int, t: int) -> Four:
        """Without the first ``n`` weight rows and ``t`` rows of x."""
        return Four(self.w[n:], self.scales[n:], self.middles[n:], self.x_scales[t:], self.sums[t:])


def dot_int4(weight_rows: int, rows: int, four: Four, x: NDArray[np.int16], k: int) -> Floats:
    """As `dot`; ``four.w`` has as many numbers in a row as fit."""
    y = np.full((rows + 1, weight_rows + 2), GUARD)
    at = four.w.ctypes.data, 2 * four.w.shape[1], x.ctypes.data, x.shape[1]
    tables = (table.ctypes.data for table in four[1:])
    run_dot_int4(weight_rows, rows, *at, k, y.ctypes.data, y.shape[1], *tables, four.scales.shape[1])
    assert (y[rows:] == GUARD).all() and (y[:, weight_rows:] == GUARD).all()
    return y[:rows, :weight_rows]


@pytest.mark.parametrize("k", SIZES)
def test_int4_dot_equals_fp64_and_has_the_same_bits_in_every_tile(k: int) -> None:
    generator = np.random.default_rng(k)
    groups = -(-k // 32)
    w = generator.integers(0, 256, (INT_WEIGHT_ROWS, (k + 1) // 2 + 2)).astype(np.uint8)
    x = np.full((ROWS, k + 3), 32767, np.int16)
    x[:, :k] = generator.integers(-32767, 32768, (ROWS, k))
    padded_x = np.pad(x[:, :k].astype(np.float64), ((0, 0), (0, 32 * groups - k)))
    four = Four(
        w,
        generator.standard_normal((INT_WEIGHT_ROWS, groups), dtype=np.float32),
        generator.standard_normal((INT_WEIGHT_ROWS, groups)).astype(np.float16),
        generator.random(ROWS, dtype=np.float32),
        padded_x.reshape(ROWS, groups, 32).sum(-1).astype(np.float32),
    )

    def wide(table: NDArray[Any]) -> NDArray[np.float64]:
        return table.astype(np.float64).repeat(32, axis=1)[:, :k]

    numbers = np.stack((w & 15, w >> 4), axis=-1).reshape(INT_WEIGHT_ROWS, -1)[:, :k].astype(np.float64) - 8
    weights = numbers * wide(four.scales) + wide(four.middles)
    exact = x[:, :k].astype(np.float64) @ weights.T * four.x_scales[:, None]
    magnitudes = np.abs(numbers * wide(four.scales)) + np.abs(wide(four.middles))
    size = np.abs(x[:, :k].astype(np.float64)) @ magnitudes.T * four.x_scales[:, None]
    alone = np.array(
        [[dot_int4(1, 1, four.from_row(n, t), x[t:], k)[0, 0] for n in range(INT_WEIGHT_ROWS)] for t in range(ROWS)]
    )
    assert (np.abs(alone - exact) <= 2e-7 * (8 + k / LANES) * size).all()
    for weight_rows, rows in INT_TILES:
        assert np.array_equal(dot_int4(weight_rows, rows, four, x, k), alone[:rows, :weight_rows])


@pytest.mark.parametrize("k", [0, 1, 4, 16, 37, 64])
def test_expand_equals_fp64_and_has_the_same_bits_in_every_tile(k: int) -> None:
    generator = np.random.default_rng(k)
    h, m = padded(ROWS, k, 5), np.full((k + 1, STRIP + 7), np.nan, dtype=np.float32)
    m[:k, :STRIP] = generator.standard_normal((k, STRIP))
    before = generator.standard_normal((ROWS, STRIP), dtype=np.float32)
    exact = before + h[:, :k].astype(np.float64) @ m[:k, :STRIP].astype(np.float64)
    size = np.abs(before) + np.abs(h[:, :k]) @ np.abs(m[:k, :STRIP])

    def expand(vectors: int, rows: int, start: int, columns: int) -> Floats:
        y = np.full((rows + 1, columns + 2), GUARD)
        y[:rows, 1:-1] = before[:rows, start : start + columns]
        at = m.ctypes.data + 4 * start
        run_expand(vectors, rows, h.ctypes.data, h.shape[1], at, m.shape[1], k, y.ctypes.data + 4, y.shape[1], columns)
        assert (y[rows:] == GUARD).all() and (y[:, [0, -1]] == GUARD).all()
        return y[:rows, 1:-1]

    for rows in range(1, ROWS + 1):
        wide = expand(4, rows, 0, STRIP)
        assert (np.abs(wide - exact[:rows]) <= 2e-7 * (4 + k) * size[:rows]).all()
        for start in range(0, STRIP, LANES):
            assert np.array_equal(expand(1, rows, start, LANES), wide[:, start : start + LANES])
        for columns in range(1, LANES):
            assert np.array_equal(expand(0, rows, 3, columns), wide[:, 3 : 3 + columns])
        assert np.array_equal(expand(4, 1, 0, STRIP)[0], wide[0])


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
    """Operands that end where the process has no memory: one access behind the end would kill the test run."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end = base + 2 * page
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), no_access) == 0
    y = np.zeros((ROWS, STRIP), dtype=np.float32)
    scale = np.zeros(ROWS, dtype=np.float32)
    for n in (1, LANES - 1, LANES + 1, 2 * LANES + 3):
        run_dot(1, 1, end - 4 * n, n, end - 4 * n, n, n, y.ctypes.data, STRIP)
        run_dot_bfloat16(1, 1, end - 2 * n, n, end - 4 * n, n, n, y.ctypes.data, STRIP)
        run_dot_int8(1, 1, end - n, n, end - 2 * n, n, n, y.ctypes.data, STRIP, scale.ctypes.data, scale.ctypes.data)
        halves = end - (n + 1) // 2
        groups = -(-n // 32)
        tables = scale.ctypes.data, end - 2 * groups, scale.ctypes.data, end - 4 * groups, groups
        run_dot_int4(1, 1, halves, n, end - 2 * n, n, n, y.ctypes.data, STRIP, *tables)
        run_exp_sum(end - 4 * n, n, scale.ctypes.data)
        run_silu_multiply(end - 4 * n, end - 4 * n, end - 4 * n, n)
    for columns in range(1, LANES):
        run_expand(0, 1, y.ctypes.data, 1, end - 4 * columns, columns, 1, end - 4 * columns, columns, columns)


def test_atomics() -> None:
    where = np.array([2**40, -7, 99], dtype=np.int64)
    assert run_atomics(where.ctypes.data + 8, 5) == (-7, -2)
    assert run_atomics(where.ctypes.data + 8, -(2**35)) == (-2, -2 - 2**35)
    assert where.tolist() == [2**40, -2 - 2**35, 99]

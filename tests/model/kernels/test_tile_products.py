"""The tiles of matrix products against numpy in fp64: at each size, on guarded memory, and to the same bits in each."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkwise.model.kernels.compile import entry
from chunkwise.model.kernels.tile_products import (
    FLOAT_ROWS,
    INTS_TOGETHER,
    ROWS,
    STRIP,
    WEIGHT_ROWS,
    dots,
    dots_int4,
    dots_int8,
    expand,
    expand_one,
    largest_activation,
)
from chunkwise.model.kernels.vector import LANES
from guarded import GUARD, memory_end

Floats = NDArray[np.float32]

SIZES = sorted({1, 2, LANES - 1, LANES, LANES + 1, 2 * LANES, 2 * LANES + 1, 40, 101, 576, 1541})
ONE, TURNS, TOGETHER = range(3)
TILES = [*product((ONE, TURNS), range(1, ROWS + 1)), *product((TOGETHER,), range(1, FLOAT_ROWS + 1))]
INT_TILES = list(product((ONE, TURNS, TOGETHER), range(1, ROWS + 1)))

_one, _turns, _together = dots(1), dots(WEIGHT_ROWS), dots(WEIGHT_ROWS, WEIGHT_ROWS)
_half_one, _half_turns = dots(1, bfloat16=True), dots(WEIGHT_ROWS, bfloat16=True)
_half_together = dots(WEIGHT_ROWS, WEIGHT_ROWS, bfloat16=True)
_int8_one, _int8_turns, _int8_together = dots_int8(1), dots_int8(WEIGHT_ROWS), dots_int8(WEIGHT_ROWS, INTS_TOGETHER)
_int4_one, _int4_turns, _int4_together = dots_int4(1), dots_int4(WEIGHT_ROWS), dots_int4(WEIGHT_ROWS, INTS_TOGETHER)
_wide, _narrow, _rest = expand(4), expand(1), expand(0)


@entry
def run_dot(tile, rows, w, ldw, x, ldx, k, y, ldy, ahead):
    if tile == ONE:
        _one(w, ldw, x, ldx, k, y, ldy, ahead, rows)
    elif tile == TURNS:
        _turns(w, ldw, x, ldx, k, y, ldy, ahead, rows)
    else:
        _together(w, ldw, x, ldx, k, y, ldy, ahead, rows)


@entry
def run_dot_bfloat16(tile, rows, w, ldw, x, ldx, k, y, ldy, ahead):
    if tile == ONE:
        _half_one(w, ldw, x, ldx, k, y, ldy, ahead, rows)
    elif tile == TURNS:
        _half_turns(w, ldw, x, ldx, k, y, ldy, ahead, rows)
    else:
        _half_together(w, ldw, x, ldx, k, y, ldy, ahead, rows)


@entry
def run_dot_int8(tile, rows, w, ldw, x, ldx, k, y, ldy, ws, xs, ahead):
    if tile == ONE:
        _int8_one(w, ldw, x, ldx, k, y, ldy, ws, xs, ahead, rows)
    elif tile == TURNS:
        _int8_turns(w, ldw, x, ldx, k, y, ldy, ws, xs, ahead, rows)
    else:
        _int8_together(w, ldw, x, ldx, k, y, ldy, ws, xs, ahead, rows)


@entry
def run_dot_int4(tile, rows, w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ahead):
    if tile == ONE:
        _int4_one(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ahead, rows)
    elif tile == TURNS:
        _int4_turns(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ahead, rows)
    else:
        _int4_together(w, ldw, x, ldx, k, y, ldy, ws, wm, xs, sums, groups, ahead, rows)


@entry
def run_expand(vectors, rows, h, ldh, m, ldm, k, y, ldy, columns):
    if vectors == 4:
        _wide(h, ldh, m, ldm, k, y, ldy, columns, rows)
    elif vectors == 1:
        _narrow(h, ldh, m, ldm, k, y, ldy, columns, rows)
    else:
        _rest(h, ldh, m, ldm, k, y, ldy, columns, rows)


@entry
def run_expand_one(h, m, ldm, k, y, columns, sums):
    expand_one(h, m, ldm, k, y, columns, sums)


def weights_of(tile: int) -> int:
    """Weight rows of a tile."""
    return 1 if tile == ONE else WEIGHT_ROWS


def padded(rows: int, k: int, seed: int) -> Floats:
    """``[rows, k + 3]`` random numbers; what lies beyond k is NaN, so that one read of it spoils a sum."""
    x = np.full((rows, k + 3), np.nan, dtype=np.float32)
    x[:, :k] = np.random.default_rng(seed).standard_normal((rows, k))
    return x


def same_however_far_ahead(
    tile: int, rows: int, run: Callable[..., object], before: Any, behind: Any, k: int
) -> Floats:
    """``y`` [rows, weight rows] of one tile, checked to have written nothing else, and to be the same whatever weights
    the tile asks for ahead."""
    n = weights_of(tile)
    results = []
    for ahead in (0, k + 3, n * (k + 3)):
        y = np.full((rows + 1, n + 2), GUARD)
        run(tile, rows, *before, k, y.ctypes.data, y.shape[1], *behind, ahead)
        assert (y[rows:] == GUARD).all() and (y[:, n:] == GUARD).all()
        results.append(y[:rows, :n])
    assert all(np.array_equal(result, results[0], equal_nan=True) for result in results)
    return results[0]


def dot(tile: int, rows: int, w: Floats | NDArray[np.uint16], x: Floats, k: int) -> Floats:
    """One tile's ``y``; ``w`` of 16 bits is bfloat16."""
    run = run_dot_bfloat16 if w.dtype == np.uint16 else run_dot
    at = w.ctypes.data, w.shape[1], x.ctypes.data, x.shape[1]
    return same_however_far_ahead(tile, rows, run, at, (), k)


@pytest.mark.parametrize("k", SIZES)
def test_dot_equals_fp64(k: int) -> None:
    w, x = padded(WEIGHT_ROWS, k, 1), padded(ROWS, k, 2)
    exact = x[:, :k].astype(np.float64) @ w[:, :k].T.astype(np.float64)
    size = np.abs(x[:, :k]) @ np.abs(w[:, :k]).T
    for tile, rows in TILES:
        error = np.abs(dot(tile, rows, w, x, k) - exact[:rows, : weights_of(tile)])
        assert (error <= 2e-7 * (8 + k / LANES) * size[:rows, : weights_of(tile)]).all(), (tile, rows)


@pytest.mark.parametrize("k", SIZES)
def test_a_dot_has_the_same_bits_in_every_tile_and_at_every_address(k: int) -> None:
    w, x = padded(WEIGHT_ROWS, k, 3), padded(ROWS, k, 4)
    alone = np.array([[dot(ONE, 1, w[n:], x[t:], k)[0, 0] for n in range(WEIGHT_ROWS)] for t in range(ROWS)])
    for tile, rows in TILES:
        assert np.array_equal(dot(tile, rows, w, x, k), alone[:rows, : weights_of(tile)]), (tile, rows)
    wider_w, wider_x = padded(WEIGHT_ROWS, k + 5, 3), padded(ROWS, k + 5, 4)
    wider_w[:, :k], wider_x[:, :k] = w[:, :k], x[:, :k]
    assert np.array_equal(dot(TURNS, ROWS, wider_w, wider_x, k), alone)


@pytest.mark.parametrize("k", SIZES)
def test_a_bfloat16_dot_has_the_bits_of_the_same_numbers_in_fp32(k: int) -> None:
    bits = np.random.default_rng(k).integers(0, 2**16, (WEIGHT_ROWS, k + 3)).astype(np.uint16)
    # All numbers below 2^16, of both signs, tiny ones among them; what lies beyond k is NaN.
    bits[:, :k] &= 0xC7FF
    bits[:, k:] = 0x7FC0
    w, x = (bits.astype(np.uint32) << 16).view(np.float32), padded(ROWS, k, 6)
    want = dot(TURNS, ROWS, w, x, k)
    assert np.isfinite(want).all()
    for tile, rows in TILES:
        assert np.array_equal(dot(tile, rows, bits, x, k), want[:rows, : weights_of(tile)]), (tile, rows)


def dot_int8(tile: int, rows: int, w: NDArray[np.int8], x: NDArray[np.int16], k: int, ws: Floats, xs: Floats) -> Floats:
    """As `dot`."""
    scales = ws.ctypes.data, xs.ctypes.data
    at = w.ctypes.data, w.shape[1], x.ctypes.data, x.shape[1]
    return same_however_far_ahead(tile, rows, run_dot_int8, at, scales, k)


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
    ws = np.array([1.0, 0.5, 3e-3, 0.0], dtype=np.float32)[:WEIGHT_ROWS]
    xs = np.array([1.0, 2.0, 7e-5, 1e-3], dtype=np.float32)
    for w, x in _extremes(k, WEIGHT_ROWS, ROWS):
        products = x[:, None, :k].astype(np.int64) * w[None, :, :k]
        scales = xs[:, None].astype(np.float64) * ws
        exact, size = products.sum(-1) * scales, np.abs(products).sum(-1) * scales
        for tile, rows in INT_TILES:
            got = dot_int8(tile, rows, w, x, k, ws, xs)
            assert (np.abs(got - exact[:rows, : weights_of(tile)]) <= 1e-6 * size[:rows, : weights_of(tile)]).all()


@pytest.mark.parametrize("k", SIZES)
def test_int8_dot_is_exact_where_fp32_can_hold_it_and_the_same_bits_in_every_tile(k: int) -> None:
    generator = np.random.default_rng(k)
    w = np.full((WEIGHT_ROWS, k + 3), 127, np.int8)
    x = np.full((ROWS, k + 3), 32767, np.int16)
    w[:, :k], x[:, :k] = generator.integers(-127, 128, (WEIGHT_ROWS, k)), generator.integers(-60, 61, (ROWS, k))
    ones = np.ones(ROWS, dtype=np.float32)
    exact = x[:, :k].astype(np.int64) @ w[:, :k].T.astype(np.int64)
    ws, xs = (generator.random(ROWS, dtype=np.float32) for _ in range(2))
    alone = np.array(
        [[dot_int8(ONE, 1, w[n:], x[t:], k, ws[n:], xs[t:])[0, 0] for n in range(WEIGHT_ROWS)] for t in range(ROWS)]
    )
    for tile, rows in INT_TILES:
        got = dot_int8(tile, rows, w, x, k, ones, ones)
        assert np.array_equal(got, exact[:rows, : weights_of(tile)].astype(np.float32))
        assert np.array_equal(dot_int8(tile, rows, w, x, k, ws, xs), alone[:rows, : weights_of(tile)])


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


def dot_int4(tile: int, rows: int, four: Four, x: NDArray[np.int16], k: int) -> Floats:
    """As `dot`; ``four.w`` has as many numbers in a row as fit."""
    at = four.w.ctypes.data, 2 * four.w.shape[1], x.ctypes.data, x.shape[1]
    tables = [table.ctypes.data for table in four[1:]]
    return same_however_far_ahead(tile, rows, run_dot_int4, at, (*tables, four.scales.shape[1]), k)


@pytest.mark.parametrize("k", SIZES)
def test_int4_dot_equals_fp64_and_has_the_same_bits_in_every_tile(k: int) -> None:
    generator = np.random.default_rng(k)
    groups = -(-k // 32)
    w = generator.integers(0, 256, (WEIGHT_ROWS, (k + 1) // 2 + 2)).astype(np.uint8)
    x = np.full((ROWS, k + 3), 32767, np.int16)
    x[:, :k] = generator.integers(-32767, 32768, (ROWS, k))
    padded_x = np.pad(x[:, :k].astype(np.float64), ((0, 0), (0, 32 * groups - k)))
    four = Four(
        w,
        generator.standard_normal((WEIGHT_ROWS, groups), dtype=np.float32),
        generator.standard_normal((WEIGHT_ROWS, groups)).astype(np.float16),
        generator.random(ROWS, dtype=np.float32),
        padded_x.reshape(ROWS, groups, 32).sum(-1).astype(np.float32),
    )

    def wide(table: NDArray[Any]) -> NDArray[np.float64]:
        return table.astype(np.float64).repeat(32, axis=1)[:, :k]

    numbers = np.stack((w & 15, w >> 4), axis=-1).reshape(WEIGHT_ROWS, -1)[:, :k].astype(np.float64) - 8
    weights = numbers * wide(four.scales) + wide(four.middles)
    exact = x[:, :k].astype(np.float64) @ weights.T * four.x_scales[:, None]
    magnitudes = np.abs(numbers * wide(four.scales)) + np.abs(wide(four.middles))
    size = np.abs(x[:, :k].astype(np.float64)) @ magnitudes.T * four.x_scales[:, None]
    alone = np.array(
        [[dot_int4(ONE, 1, four.from_row(n, t), x[t:], k)[0, 0] for n in range(WEIGHT_ROWS)] for t in range(ROWS)]
    )
    assert (np.abs(alone - exact) <= 2e-7 * (8 + k / LANES) * size).all()
    for tile, rows in INT_TILES:
        assert np.array_equal(dot_int4(tile, rows, four, x, k), alone[:rows, : weights_of(tile)])


@pytest.mark.parametrize("k", [0, 1, 4, 16, 37, 64])
def test_expand_equals_fp64_and_has_the_same_bits_in_every_tile(k: int) -> None:
    generator = np.random.default_rng(k)
    h, m = padded(ROWS, k, 5), np.full((k + 1, STRIP + 7), np.nan, dtype=np.float32)
    m[:k, :STRIP] = generator.standard_normal((k, STRIP))
    before = generator.standard_normal((ROWS, STRIP), dtype=np.float32)
    exact = before + h[:, :k].astype(np.float64) @ m[:k, :STRIP].astype(np.float64)
    size = np.abs(before) + np.abs(h[:, :k]) @ np.abs(m[:k, :STRIP])

    def expanded(vectors: int, rows: int, start: int, columns: int) -> Floats:
        y = np.full((rows + 1, columns + 2), GUARD)
        y[:rows, 1:-1] = before[:rows, start : start + columns]
        at = m.ctypes.data + 4 * start
        run_expand(vectors, rows, h.ctypes.data, h.shape[1], at, m.shape[1], k, y.ctypes.data + 4, y.shape[1], columns)
        assert (y[rows:] == GUARD).all() and (y[:, [0, -1]] == GUARD).all()
        return y[:rows, 1:-1]

    for rows in range(1, FLOAT_ROWS + 1):
        wide = expanded(4, rows, 0, STRIP)
        assert (np.abs(wide - exact[:rows]) <= 2e-7 * (4 + k) * size[:rows]).all()
        for start in range(0, STRIP, LANES):
            assert np.array_equal(expanded(1, rows, start, LANES), wide[:, start : start + LANES])
        for columns in range(1, LANES):
            assert np.array_equal(expanded(0, rows, 3, columns), wide[:, 3 : 3 + columns])
        assert np.array_equal(expanded(4, 1, 0, STRIP)[0], wide[0])


@pytest.mark.parametrize("k", [0, 1, 3, 4, 7, 16, 37])
def test_one_row_is_expanded_to_the_same_bits(k: int) -> None:
    generator = np.random.default_rng(k)
    for columns in (1, LANES - 1, LANES, 3 * LANES + 5, 192):
        h, m = padded(1, k, 7), generator.standard_normal((k + 1, columns + 3), dtype=np.float32)
        want = np.full(columns + 2, GUARD)
        want[1:-1] = generator.standard_normal(columns)
        got, sums = want.copy(), np.full(columns + 1, GUARD)
        at = h.ctypes.data, h.shape[1], m.ctypes.data, m.shape[1]
        for c in range(0, columns, LANES):
            width = min(LANES, columns - c)
            to = want.ctypes.data + 4 * (c + 1)
            run_expand(width // LANES, 1, *at[:2], at[2] + 4 * c, at[3], k, to, columns, width)
        run_expand_one(h.ctypes.data, *at[2:], k, got.ctypes.data + 4, columns, sums.ctypes.data)
        assert np.array_equal(got, want) and sums[-1] == GUARD


def test_masked_ends_touch_nothing_behind_them() -> None:
    end = memory_end()
    y = np.zeros((ROWS, STRIP), dtype=np.float32)
    scale = np.zeros(ROWS, dtype=np.float32)
    at, scales = (y.ctypes.data, STRIP), (scale.ctypes.data, scale.ctypes.data)
    for n in (1, LANES - 1, LANES + 1, 2 * LANES + 3):
        for tile in (ONE, TURNS, TOGETHER):
            # All weight rows lie at one place.
            run_dot(tile, 1, end - 4 * n, 0, end - 4 * n, n, n, *at, n)
            run_dot_bfloat16(tile, 1, end - 2 * n, 0, end - 4 * n, n, n, *at, n)
            run_dot_int8(tile, 1, end - n, 0, end - 2 * n, n, n, *at, *scales, n)
        halves = end - (n + 1) // 2
        groups = -(-n // 32)
        tables = scale.ctypes.data, end - 2 * groups, scale.ctypes.data, end - 4 * groups, groups
        run_dot_int4(ONE, 1, halves, n, end - 2 * n, n, n, *at, *tables, n)
        run_expand_one(y.ctypes.data, end - 4 * n, n, 1, end - 4 * n, n, end - 4 * n)
    for columns in range(1, LANES):
        run_expand(0, 1, y.ctypes.data, 1, end - 4 * columns, columns, 1, end - 4 * columns, columns, columns)

"""Matrix products ``y = x wᵀ`` over a range of weight rows, by one thread."""

from __future__ import annotations

from chunkwise.model.kernels.compile import kernel
from chunkwise.model.kernels.tiles import (
    FLOAT_ROWS,
    FLOAT_WEIGHT_ROWS,
    INT_WEIGHT_ROWS,
    ROWS,
    dot_tile,
    dot_tile_int4,
    dot_tile_int8,
)
from chunkwise.model.kernels.views import BFLOAT16, FLOAT32, INT4, INT8, NONE

_dot_1_1, _dot_1_2, _dot_1_3, _dot_1_4 = (dot_tile(1, rows) for rows in range(1, 5))
_dot_n_1, _dot_n_2, _dot_n_3, _dot_n_4 = (dot_tile(FLOAT_WEIGHT_ROWS, rows) for rows in range(1, 5))
_half_1_1, _half_1_2, _half_1_3, _half_1_4 = (dot_tile(1, rows, bfloat16=True) for rows in range(1, 5))
_half_n_1, _half_n_2, _half_n_3, _half_n_4 = (dot_tile(FLOAT_WEIGHT_ROWS, rows, bfloat16=True) for rows in range(1, 5))
_int8_1_1, _int8_1_2, _int8_1_3, _int8_1_4 = (dot_tile_int8(1, rows) for rows in range(1, 5))
_int8_n_1, _int8_n_2, _int8_n_3, _int8_n_4 = (dot_tile_int8(INT_WEIGHT_ROWS, rows) for rows in range(1, 5))
_int4_1_1, _int4_1_2, _int4_1_3, _int4_1_4 = (dot_tile_int4(1, rows) for rows in range(1, 5))
_int4_n_1, _int4_n_2, _int4_n_3, _int4_n_4 = (dot_tile_int4(INT_WEIGHT_ROWS, rows) for rows in range(1, 5))

# x rows times k, and rows of y, that stay in the second-level cache while the weights pass by.
_BLOCK_FLOATS = 96 * 1024
_BLOCK_ROWS = 96
# Up to so many rows every tile asks for the weights of the next, and not the first of them alone.
_ASKING_ROWS = 48


@kernel
def _one(kind, rows, w, x, k, y, ldy, w_scales, w_middles, x_scales, x_sums, ahead):
    """One weight row times 1 to 4 rows of x."""
    if kind == INT8:
        if rows == 1:
            _int8_1_1(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead)
        elif rows == 2:
            _int8_1_2(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead)
        elif rows == 3:
            _int8_1_3(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead)
        else:
            _int8_1_4(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead)
    elif kind == INT4:
        groups = (k + 31) // 32
        if rows == 1:
            _int4_1_1(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead)
        elif rows == 2:
            _int4_1_2(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead)
        elif rows == 3:
            _int4_1_3(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead)
        else:
            _int4_1_4(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead)
    elif kind == BFLOAT16:
        if rows == 1:
            _half_1_1(w, k, x, k, k, y, ldy, ahead)
        elif rows == 2:
            _half_1_2(w, k, x, k, k, y, ldy, ahead)
        elif rows == 3:
            _half_1_3(w, k, x, k, k, y, ldy, ahead)
        else:
            _half_1_4(w, k, x, k, k, y, ldy, ahead)
    else:
        if rows == 1:
            _dot_1_1(w, k, x, k, k, y, ldy, ahead)
        elif rows == 2:
            _dot_1_2(w, k, x, k, k, y, ldy, ahead)
        elif rows == 3:
            _dot_1_3(w, k, x, k, k, y, ldy, ahead)
        else:
            _dot_1_4(w, k, x, k, k, y, ldy, ahead)


@kernel
def _several(kind, rows, w, x, k, y, ldy, w_scales, w_middles, x_scales, x_sums, ahead):
    """`FLOAT_WEIGHT_ROWS` or `INT_WEIGHT_ROWS` weight rows times 1 to 4 rows of x."""
    if kind == INT8:
        if rows == 1:
            _int8_n_1(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead)
        elif rows == 2:
            _int8_n_2(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead)
        elif rows == 3:
            _int8_n_3(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead)
        else:
            _int8_n_4(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead)
    elif kind == INT4:
        groups = (k + 31) // 32
        if rows == 1:
            _int4_n_1(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead)
        elif rows == 2:
            _int4_n_2(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead)
        elif rows == 3:
            _int4_n_3(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead)
        else:
            _int4_n_4(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead)
    elif kind == BFLOAT16:
        if rows == 1:
            _half_n_1(w, k, x, k, k, y, ldy, ahead)
        elif rows == 2:
            _half_n_2(w, k, x, k, k, y, ldy, ahead)
        elif rows == 3:
            _half_n_3(w, k, x, k, k, y, ldy, ahead)
        else:
            _half_n_4(w, k, x, k, k, y, ldy, ahead)
    else:
        if rows == 1:
            _dot_n_1(w, k, x, k, k, y, ldy, ahead)
        elif rows == 2:
            _dot_n_2(w, k, x, k, k, y, ldy, ahead)
        elif rows == 3:
            _dot_n_3(w, k, x, k, k, y, ldy, ahead)
        else:
            _dot_n_4(w, k, x, k, k, y, ldy, ahead)


@kernel
def multiply(kind, w, w_scales, w_middles, first, last, x, x_scales, x_sums, rows, k, y, ldy):
    """``y[t, n] = Σ_k w[n, k] x[t, k]`` for ``first <= n < last`` and ``rows`` t; all rows have length k.

    ``kind`` `FLOAT32` and `BFLOAT16` are of ``w``, with x in fp32 and no scales; `INT8` takes 16-bit x, both with row
    scales; `INT4` the same x and the sums of its groups, with a scale and a middle per weight row and 32 columns. Few
    rows take one weight row at a time, so that the weights stream in the order they lie in memory; more take a tile
    that uses each loaded number several times.
    """
    row_bytes = 4 * k
    if kind == BFLOAT16:
        row_bytes = 2 * k
    elif kind == INT8:
        row_bytes = k
    elif kind == INT4:
        row_bytes = (k + 1) // 2
    groups = (k + 31) // 32 if kind == INT4 else 1
    x_size = 4 if kind <= BFLOAT16 else 2
    tile_rows, tile_weights = (FLOAT_ROWS, FLOAT_WEIGHT_ROWS) if kind <= BFLOAT16 else (ROWS, INT_WEIGHT_ROWS)
    if rows <= ROWS:
        for n in range(first, last):
            ws, wm = w_scales + 4 * groups * n, w_middles + 2 * groups * n
            _one(kind, rows, w + row_bytes * n, x, k, y + 4 * n, ldy, ws, wm, x_scales, x_sums, k)
        return
    block = max(min(_BLOCK_FLOATS // k, _BLOCK_ROWS) // tile_rows * tile_rows, tile_rows)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        n = first
        while n < last:
            several = n + tile_weights <= last
            step = tile_weights if several else 1
            weights, ws, wm = w + row_bytes * n, w_scales + 4 * groups * n, w_middles + 2 * groups * n
            for t in range(start, stop, tile_rows):
                at, to, count = x + x_size * t * k, y + 4 * (t * ldy + n), min(tile_rows, stop - t)
                xs, sums = x_scales + 4 * t, x_sums + 4 * groups * t
                # Many rows have time to wait for memory once; asking again costs them more than it saves.
                ahead = step * k if t == start or stop - start <= _ASKING_ROWS else 0
                if several:
                    _several(kind, count, weights, at, k, to, ldy, ws, wm, xs, sums, ahead)
                else:
                    _one(kind, count, weights, at, k, to, ldy, ws, wm, xs, sums, ahead)
            n += step


@kernel
def multiply_floats(w, first, last, x, rows, k, y, ldy):
    """`multiply` of fp32 by fp32."""
    multiply(FLOAT32, w, NONE, NONE, first, last, x, NONE, NONE, rows, k, y, ldy)

"""Matrix products ``y = x wᵀ`` over a range of weight rows, by one thread."""

from __future__ import annotations

from chunkwise.model.kernels.compile import kernel
from chunkwise.model.kernels.tile_products import (
    FLOAT_ROWS,
    INTS_TOGETHER,
    ROWS,
    WEIGHT_ROWS,
    dots,
    dots_int4,
    dots_int8,
)
from chunkwise.model.kernels.views import BFLOAT16, FLOAT32, INT4, INT8, NONE

_one, _half_one, _int8_one, _int4_one = dots(1), dots(1, bfloat16=True), dots_int8(1), dots_int4(1)
_turns, _half_turns = dots(WEIGHT_ROWS), dots(WEIGHT_ROWS, bfloat16=True)
_int8_turns, _int4_turns = dots_int8(WEIGHT_ROWS), dots_int4(WEIGHT_ROWS)
_tile, _half_tile = dots(WEIGHT_ROWS, WEIGHT_ROWS), dots(WEIGHT_ROWS, WEIGHT_ROWS, bfloat16=True)
_int8_tile, _int4_tile = dots_int8(WEIGHT_ROWS, INTS_TOGETHER), dots_int4(WEIGHT_ROWS, INTS_TOGETHER)

# x rows times k, and rows of y, that stay in the second-level cache while the weights pass by.
_BLOCK_FLOATS = 96 * 1024
_BLOCK_ROWS = 96
# Up to so many rows every tile asks for the weights of the next, and not the first of them alone.
_ASKING_ROWS = 48


@kernel
def _in_turn(kind, several, w, x, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, rows):
    """One weight row, or `WEIGHT_ROWS` in the order they lie in memory, times 1 to `ROWS` rows of x."""
    ahead = WEIGHT_ROWS * k
    if several:
        if kind == INT8:
            _int8_turns(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead, rows)
        elif kind == INT4:
            _int4_turns(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead, rows)
        elif kind == BFLOAT16:
            _half_turns(w, k, x, k, k, y, ldy, ahead, rows)
        else:
            _turns(w, k, x, k, k, y, ldy, ahead, rows)
    elif kind == INT8:
        _int8_one(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead, rows)
    elif kind == INT4:
        _int4_one(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead, rows)
    elif kind == BFLOAT16:
        _half_one(w, k, x, k, k, y, ldy, ahead, rows)
    else:
        _one(w, k, x, k, k, y, ldy, ahead, rows)


@kernel
def _together(kind, w, x, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead, rows):
    """`WEIGHT_ROWS` times up to `FLOAT_ROWS` or `ROWS` rows of x, each loaded number used several times."""
    if kind == INT8:
        _int8_tile(w, k, x, k, k, y, ldy, w_scales, x_scales, ahead, rows)
    elif kind == INT4:
        _int4_tile(w, k, x, k, k, y, ldy, w_scales, w_middles, x_scales, x_sums, groups, ahead, rows)
    elif kind == BFLOAT16:
        _half_tile(w, k, x, k, k, y, ldy, ahead, rows)
    else:
        _tile(w, k, x, k, k, y, ldy, ahead, rows)


@kernel
def bytes_per_row(kind, k):
    """Bytes of k weights that lie together."""
    if kind == INT4:
        return (k + 1) // 2
    if kind == INT8:
        return k
    return 2 * k if kind == BFLOAT16 else 4 * k


@kernel
def multiply(kind, w, w_scales, w_middles, first, last, x, x_scales, x_sums, rows, k, y, ldy):
    """``y[t, n] = Σ_k w[n, k] x[t, k]`` for ``first <= n < last`` and ``rows`` t; all rows have length k.

    ``kind`` `FLOAT32` and `BFLOAT16` are of ``w``, with x in fp32 and no scales; `INT8` takes 16-bit x, both with row
    scales; `INT4` the same x and the sums of its groups, with a scale and a middle per weight row and 32 columns. Few
    rows of x take the weight rows in turn, so that these stream in the order they lie in memory; more take them
    together.
    """
    row_bytes = bytes_per_row(kind, k)
    groups = (k + 31) // 32 if kind == INT4 else 1
    x_size = 4 if kind <= BFLOAT16 else 2
    tile_rows = FLOAT_ROWS if kind <= BFLOAT16 else ROWS
    block = rows if rows <= ROWS else max(min(_BLOCK_FLOATS // k, _BLOCK_ROWS) // tile_rows * tile_rows, tile_rows)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        n = first
        while n < last:
            several = n + WEIGHT_ROWS <= last
            weights, ws, wm = w + row_bytes * n, w_scales + 4 * groups * n, w_middles + 2 * groups * n
            step = ROWS if rows <= ROWS or not several else tile_rows
            for t in range(start, stop, step):
                at, to, count = x + x_size * t * k, y + 4 * (t * ldy + n), min(step, stop - t)
                xs, sums = x_scales + 4 * t, x_sums + 4 * groups * t
                if rows <= ROWS or not several:
                    _in_turn(kind, several, weights, at, k, to, ldy, ws, wm, xs, sums, groups, count)
                else:
                    # Many rows have time to wait for memory once; asking again costs them more than it saves.
                    ahead = WEIGHT_ROWS * k if t == start or stop - start <= _ASKING_ROWS else 0
                    _together(kind, weights, at, k, to, ldy, ws, wm, xs, sums, groups, ahead, count)
            n += WEIGHT_ROWS if several else 1


@kernel
def multiply_floats(w, first, last, x, rows, k, y, ldy):
    """`multiply` of fp32 by fp32."""
    multiply(FLOAT32, w, NONE, NONE, first, last, x, NONE, NONE, rows, k, y, ldy)

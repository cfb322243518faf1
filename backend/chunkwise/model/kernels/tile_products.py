"""The inner loops of matrix products: tiles of a few weight rows and a few rows of x.

An output element is summed along k in vector lanes, one fused multiply-add after another, then over the lanes, whatever
the tile; that is what makes a row's numbers independent of its neighbours.

Every kernel here takes the number of rows of x, 1 to 4 or `FLOAT_ROWS`, as its last argument.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from llvmlite import ir
from numba.core import cgutils

from chunkwise.model.kernels.tiles import Kernel, along, by_rows, tile
from chunkwise.model.kernels.vector import (
    BYTES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I16,
    I64,
    INTS,
    LANES,
    QUARTERS,
    SHORTS,
    WIDE,
    Mask,
    fma,
    load,
    load_masked,
    mask_below,
    multiply_pairs,
    pointer,
    prefetch,
    splat,
    spread,
    store,
    store_masked,
    total,
    totals,
    unpack,
    widen,
    widen_half,
)

ROWS = 4
"""x rows of the widest tile."""
WEIGHT_ROWS = 4
"""Weight rows of every tile that has more than one: the ends of four are summed together."""
FLOAT_ROWS = 4 if WIDE else 3
"""x rows of the widest tile of floats that takes its weight rows together: 4 x 4 sums fit 32 registers; 4 x 3 and four
operands fill 16."""
INTS_TOGETHER = 4 if WIDE else 2
"""Weight rows of integers that a tile may take together with `ROWS` of x: their products need a register more."""
CACHE_LINE = 64
"""Bytes that are read from memory together."""
STRIP = 4 * LANES
"""Columns that the widest tile of `expand` makes at a time."""

_EXPANDED_ROWS = 4
"""Rows of B that `expand_one` adds at a time, so that its sums are not read and written for each."""


def _rows(b: ir.IRBuilder, base: ir.Value, stride: ir.Value, count: int) -> list[ir.Value]:
    return [b.gep(base, [b.mul(stride, I64(i))]) for i in range(count)]


def _read(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, kind: ir.VectorType, mask: Mask | None) -> ir.Value:
    return load(b, base, offset, kind) if mask is None else load_masked(b, base, offset, kind, mask)


def _write(b: ir.IRBuilder, value: ir.Value, base: ir.Value, offset: ir.Value, mask: Mask | None) -> list[ir.Value]:
    """Returns no sums, as the body of `along` must."""
    if mask is None:
        store(b, value, base, offset)
    else:
        store_masked(b, value, base, offset, mask)
    return []


def _look_ahead(
    b: ir.IRBuilder, rows: list[ir.Value], distance: ir.Value, per_byte: int = 1
) -> Callable[[ir.Value], None]:
    """Asks for the cache line of every row ``distance`` numbers behind the one read, of ``per_byte`` to a byte."""
    shift = I64(per_byte.bit_length() - 1)

    def ask(offset: ir.Value) -> None:
        at = b.add(b.lshr(offset, shift), b.lshr(distance, shift))
        for row in rows:
            prefetch(b, row, at)

    return ask


def _store_totals(b: ir.IRBuilder, sums: list[ir.Value], row: ir.Value, scale: ir.Value | None = None) -> None:
    """Writes the total of every sum, times its part of ``scale``, one after another."""
    value = totals(b, sums) if len(sums) == WEIGHT_ROWS else total(b, sums[0])
    if scale is not None:
        value = b.fmul(value, scale)
    if len(sums) == WEIGHT_ROWS:
        store(b, value, row, I64(0))
    else:
        b.store(value, row)


def _weight_scales(b: ir.IRBuilder, scales: ir.Value, count: int) -> ir.Value:
    return load(b, scales, I64(0), ir.VectorType(F32, count)) if count > 1 else b.load(scales)


def _times_x_scale(b: ir.IRBuilder, scale: ir.Value | None, x_scale: ir.Value, count: int) -> ir.Value:
    if count > 1:
        x_scale = spread(b, x_scale, ir.VectorType(F32, count))
    return x_scale if scale is None else b.fmul(scale, x_scale)


def _dot(weight_rows: int, together: int, bfloat16: bool, rows: int, b: ir.IRBuilder, args: list[ir.Value]) -> None:
    w, ldw, x, ldx, k, y, ldy, ahead = args
    ws = _rows(b, pointer(b, w, I16 if bfloat16 else F32), ldw, weight_rows)
    xs = _rows(b, pointer(b, x, F32), ldx, rows)

    def step(some: list[ir.Value], offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
        vectors = [_read(b, row, offset, FLOATS, mask) for row in xs]
        new = []
        for i, row in enumerate(some):
            weights = _read(b, row, offset, HALVES if bfloat16 else FLOATS, mask)
            weights = widen(b, weights) if bfloat16 else weights
            new += [fma(b, weights, vector, sums[i * rows + j]) for j, vector in enumerate(vectors)]
        return new

    stretch, look = CACHE_LINE // (LANES * (2 if bfloat16 else 4)), partial(_look_ahead, b, distance=ahead)
    sums: list[ir.Value] = []
    for first in range(0, weight_rows, together):
        some = ws[first : first + together]
        zeros = [splat(FLOATS, 0.0)] * (together * rows)
        if together == 1 and not bfloat16 and not WIDE:
            sums += along(b, k, LANES, zeros, partial(step, some), 4 * stretch)
        else:
            sums += along(b, k, LANES, zeros, partial(step, some), stretch, look(some))
    for j, row in enumerate(_rows(b, pointer(b, y, F32), ldy, rows)):
        _store_totals(b, sums[j::rows], row)


@cache
def dots(weight_rows: int, together: int = 1, bfloat16: bool = False) -> Kernel:
    """``(w, ldw, x, ldx, k, y, ldy, ahead, rows)``: ``y[t, n] = Σ_k w[n, k] x[t, k]`` in fp32 for ``weight_rows`` n and
    ``rows`` t. With ``bfloat16``, ``w`` is; it widens to fp32 exactly.

    The weight rows are taken ``together``, so many at once, so that what is read of x serves them all; or, 1, in turn,
    so that memory is read from front to back. Some ask for the weight ``ahead`` numbers behind the one they read, which
    may be that of the next tile; 0 asks for nothing new. Floats in turn, on AVX2, leave that to the CPU, which guesses
    better.
    """
    most = ROWS if together == 1 else FLOAT_ROWS
    bodies = [partial(_dot, weight_rows, together, bfloat16, rows) for rows in range(1, most + 1)]
    return by_rows(f"dots_{'bfloat16_' if bfloat16 else ''}{weight_rows}_{together}", 8, bodies)


def _dot_int8(weight_rows: int, together: int, rows: int, b: ir.IRBuilder, args: list[ir.Value]) -> None:
    w, ldw, x, ldx, k, y, ldy, w_scale, x_row_scale, ahead = args
    ws = _rows(b, pointer(b, w, I8), ldw, weight_rows)
    xs = _rows(b, pointer(b, x, I16), ldx, rows)

    def step(some: list[ir.Value], offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
        vectors = [_read(b, row, offset, SHORTS, mask) for row in xs]
        new = []
        for i, row in enumerate(some):
            weights = b.sext(_read(b, row, offset, BYTES, mask), SHORTS)
            products = [multiply_pairs(b, weights, vector) for vector in vectors]
            new += [b.add(sums[i * rows + j], product) for j, product in enumerate(products)]
        return new

    sums: list[ir.Value] = []
    for first in range(0, weight_rows, together):
        some = ws[first : first + together]
        zeros = [splat(INTS, 0)] * (together * rows)
        stretch = CACHE_LINE // (2 * LANES)
        sums += along(b, k, 2 * LANES, zeros, partial(step, some), stretch, _look_ahead(b, some, ahead))
    w_scales, x_scales = _weight_scales(b, pointer(b, w_scale, F32), weight_rows), pointer(b, x_row_scale, F32)
    for j, row in enumerate(_rows(b, pointer(b, y, F32), ldy, rows)):
        scale = _times_x_scale(b, w_scales, b.load(b.gep(x_scales, [I64(j)])), weight_rows)
        _store_totals(b, [b.sitofp(value, FLOATS) for value in sums[j::rows]], row, scale)


@cache
def dots_int8(weight_rows: int, together: int = 1) -> Kernel:
    """``(w, ldw, x, ldx, k, y, ldy, w_scale, x_scale, ahead, rows)``: as `dots`, ``y[t, n] = w_scale[n] x_scale[t] Σ_k
    w[n, k] x[t, k]``.

    ``w`` is int8, ``x`` int16, the sum exact in int32: 16-bit activations cost no more than 8-bit ones, because the
    CPU multiplies pairs of 16 bits either way. The caller keeps ``|x|`` small enough for k (see `largest_activation`).
    """
    bodies = [partial(_dot_int8, weight_rows, together, rows) for rows in range(1, ROWS + 1)]
    return by_rows(f"dots_int8_{weight_rows}_{together}", 10, bodies)


def _dot_int4(weight_rows: int, together: int, rows: int, b: ir.IRBuilder, args: list[ir.Value]) -> None:
    w, ldw, x, ldx, k, y, ldy, w_scale, w_middle, x_row_scale, x_sum, groups, ahead = args
    half = b.lshr(b.add(ldw, I64(1)), I64(1))
    ws = _rows(b, pointer(b, w, I8), half, weight_rows)
    xs = _rows(b, pointer(b, x, I16), ldx, rows)
    group_scales = _rows(b, pointer(b, w_scale, F32), groups, weight_rows)
    group_middles = _rows(b, pointer(b, w_middle, I16), groups, weight_rows)
    group_sums = _rows(b, pointer(b, x_sum, F32), groups, rows)

    def step(
        some: list[ir.Value],
        scales: list[ir.Value],
        offset: ir.Value,
        sums: list[ir.Value],
        mask: Mask | None,
    ) -> list[ir.Value]:
        at, group = b.lshr(offset, I64(1)), b.lshr(offset, I64(5))
        vectors = [_read(b, row, offset, SHORTS, mask) for row in xs]
        pairs = mask and mask_below(b, b.lshr(b.add(b.sub(k, offset), I64(1)), I64(1)), LANES)
        new = []
        for i, row in enumerate(some):
            weights = unpack(b, _read(b, row, at, QUARTERS, pairs))
            scale = spread(b, b.load(b.gep(scales[i], [group])), FLOATS)
            for j, vector in enumerate(vectors):
                products = b.sitofp(multiply_pairs(b, weights, vector), FLOATS)
                new.append(fma(b, products, scale, sums[i * rows + j]))
        return new

    def middle_step(some: list[ir.Value], offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
        vectors = [_read(b, row, offset, FLOATS, mask) for row in group_sums]
        new = []
        for i, row in enumerate(some):
            middles = widen_half(b, _read(b, row, offset, HALVES, mask))
            new += [fma(b, middles, vector, sums[i * rows + j]) for j, vector in enumerate(vectors)]
        return new

    sums: list[ir.Value] = []
    for first in range(0, weight_rows, together):
        some = slice(first, first + together)
        zeros, stretch = [splat(FLOATS, 0.0)] * (together * rows), CACHE_LINE // LANES
        begun = along(b, groups, LANES, zeros, partial(middle_step, group_middles[some]))
        look = _look_ahead(b, ws[some], ahead, per_byte=2)
        sums += along(b, k, 2 * LANES, begun, partial(step, ws[some], group_scales[some]), stretch, look)
    x_scales = pointer(b, x_row_scale, F32)
    for j, row in enumerate(_rows(b, pointer(b, y, F32), ldy, rows)):
        scale = _times_x_scale(b, None, b.load(b.gep(x_scales, [I64(j)])), weight_rows)
        _store_totals(b, sums[j::rows], row, scale)


@cache
def dots_int4(weight_rows: int, together: int = 1) -> Kernel:
    """``(w, ldw, x, ldx, k, y, ldy, w_scale, w_middle, x_scale, x_sum, groups, ahead, rows)``: as `dots` for weights of
    4 bits, ``w_scale[n, g] (w[n, k] - 8) + w_middle[n, g]`` with g = k / 32, see `model.linear.Matrix`.

    Row n of ``w`` begins ``n ⌈ldw / 2⌉`` bytes behind it. ``x`` is int16, each row times ``x_scale[t]``, and ``x_sum[t,
    g]`` are the sums of its groups as floats: what the middles are multiplied with. Rows of all four tables have length
    ``groups``. The 32 products that share a scale are summed exactly, groups in fp32.
    """
    bodies = [partial(_dot_int4, weight_rows, together, rows) for rows in range(1, ROWS + 1)]
    return by_rows(f"dots_int4_{weight_rows}_{together}", 13, bodies)


def largest_activation(k: int) -> int:
    """The largest |x| for which `dots_int8` cannot overflow: a lane adds up about ``k / LANES`` products."""
    return min(32767, (2**31 - 1) // (127 * (k // LANES + 2)))


def _expand(vectors: int, rows: int, b: ir.IRBuilder, args: list[ir.Value]) -> None:
    masked, vectors = vectors == 0, max(vectors, 1)
    h, ldh, m, ldm, k, y, ldy, columns = args
    hs = _rows(b, pointer(b, h, F32), ldh, rows)
    matrix = pointer(b, m, F32)
    mask = mask_below(b, columns, LANES) if masked else None
    offsets = [I64(i * LANES) for i in range(vectors)]

    def step(index: ir.Value, sums: list[ir.Value], unused: Mask | None) -> list[ir.Value]:
        row = b.gep(matrix, [b.mul(index, ldm)])
        if vectors == 4:
            for ahead in range(STRIP, 2 * STRIP, CACHE_LINE // 4):
                prefetch(b, row, I64(ahead))
        factors = [spread(b, b.load(b.gep(weights, [index])), FLOATS) for weights in hs]
        new = list(sums)
        for i, o in enumerate(offsets):
            part = _read(b, row, o, FLOATS, mask)
            for j, factor in enumerate(factors):
                new[j * vectors + i] = fma(b, factor, part, sums[j * vectors + i])
        return new

    sums = along(b, k, 1, [splat(FLOATS, 0.0)] * (vectors * rows), step)
    for j, row in enumerate(_rows(b, pointer(b, y, F32), ldy, rows)):
        for i, offset in enumerate(offsets):
            _write(b, b.fadd(_read(b, row, offset, FLOATS, mask), sums[j * vectors + i]), row, offset, mask)


@cache
def expand(vectors: int) -> Kernel:
    """``(h, ldh, m, ldm, k, y, ldy, columns, rows)``: ``y[t, c] += Σ_k h[t, k] m[k, c]`` in fp32 for ``rows`` t.

    With ``vectors`` n it makes n full vectors of columns; with 0 it makes ``columns``, fewer than a vector. Four
    vectors ask for the columns that come next, since rows lie too far apart for the CPU to guess.
    """
    bodies = [partial(_expand, vectors, rows) for rows in range(1, FLOAT_ROWS + 1)]
    return by_rows(f"expand_{vectors}", 8, bodies)


def _expand_one(b: ir.IRBuilder, args: list[ir.Value]) -> None:
    h, m, ldm, k, y, columns, sums = args
    weights, matrix, out, kept = (pointer(b, address, F32) for address in (h, m, y, sums))

    def begin(offset: ir.Value, unused: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
        return _write(b, splat(FLOATS, 0.0), kept, offset, mask)

    def add(first: ir.Value, count: int) -> None:
        numbers = [b.add(first, I64(i)) for i in range(count)]
        rows = [b.gep(matrix, [b.mul(number, ldm)]) for number in numbers]
        factors = [spread(b, b.load(b.gep(weights, [number])), FLOATS) for number in numbers]

        def step(offset: ir.Value, unused: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
            value = _read(b, kept, offset, FLOATS, mask)
            for factor, row in zip(factors, rows, strict=True):
                value = fma(b, factor, _read(b, row, offset, FLOATS, mask), value)
            return _write(b, value, kept, offset, mask)

        along(b, columns, LANES, [], step)

    def end(offset: ir.Value, unused: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
        value = b.fadd(_read(b, out, offset, FLOATS, mask), _read(b, kept, offset, FLOATS, mask))
        return _write(b, value, out, offset, mask)

    along(b, columns, LANES, [], begin)
    several = b.and_(k, I64(-_EXPANDED_ROWS))
    with cgutils.for_range(b, b.udiv(k, I64(_EXPANDED_ROWS))) as loop:
        add(b.mul(loop.index, I64(_EXPANDED_ROWS)), _EXPANDED_ROWS)
    with cgutils.for_range(b, b.sub(k, several)) as loop:
        add(b.add(several, loop.index), 1)
    along(b, columns, LANES, [], end)


expand_one = tile("expand_one", 7, _expand_one)
"""``(h, m, ldm, k, y, columns, sums)``: to the bit what `expand` adds to one row, for any number of columns. It reads
``m`` as it lies in memory, which is faster where one row of y is all that it is read for. ``sums`` has room for
``columns`` floats."""

"""The inner loops, as functions that numba code calls with plain integer addresses.

An output element is summed along k in vector lanes, one fused multiply-add after another, then over the lanes, whatever
the tile's size; that is what makes a row's numbers independent of its neighbours. Ends that do not fill a vector are
masked, so any size works.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from chunkwise.model.kernels.library import offer
from chunkwise.model.kernels.vector import (
    BYTES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    QUARTERS,
    SHORTS,
    WIDE,
    Mask,
    call,
    exp,
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

Body = Callable[[ir.IRBuilder, list[ir.Value]], "ir.Value | None"]
Kernel = Callable[..., Any]

ROWS = 4
"""x rows of the widest tile."""
FLOAT_WEIGHT_ROWS, FLOAT_ROWS = (4, 4) if WIDE else (4, 3)
"""Weight rows and x rows of the widest tile of floats: 4 x 4 sums fit 32 registers; 4 x 3 and four operands fill 16."""
INT_WEIGHT_ROWS = 4 if WIDE else 2
"""Weight rows of the widest tile of integers, whose products need a register more, times `ROWS`."""
CACHE_LINE = 64
"""Bytes that are read from memory together."""
STRIP = 4 * LANES
"""Columns that `expand_tile` makes at a time."""


_LLVM = {types.void: ir.VoidType(), types.int64: I64, types.float32: F32, types.voidptr: I8.as_pointer()}


def tile(name: str, arguments: int, body: Body, result: Any = types.void, shared: bool = True) -> Kernel:
    """A numba function of ``arguments`` int64 whose code ``body`` writes.

    It becomes one LLVM function, never built into its callers: they are many, and compiling would take minutes. It
    lies in the library of all tiles, or, not ``shared``, beside its caller, where LLVM sees what it does.
    """
    symbol, llvm = f"chunkwise_{name}", ir.FunctionType(_LLVM[result], [I64] * arguments)

    def kernel(typing_context: Any, *args: Any) -> Any:
        def generate(context: Any, b: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
            if shared:
                function = cgutils.get_or_insert_function(b.module, llvm, symbol)
            else:
                function = b.module.globals.get(symbol) or _define(b.module, symbol, llvm, body)
                function.linkage = "linkonce_odr"
            value = b.call(function, values)
            return context.get_dummy_value() if result is types.void else value

        return result(*[types.int64] * arguments), generate

    # numba counts the parameters that the signature names.
    parameters = [Parameter(f"a{i}", Parameter.POSITIONAL_OR_KEYWORD) for i in range(arguments + 1)]
    kernel.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    if shared:
        offer(symbol, lambda module: _define(module, symbol, llvm, body))
    made: Kernel = intrinsic(kernel)
    return made


def _define(module: ir.Module, symbol: str, llvm: ir.FunctionType, body: Body) -> ir.Function:
    function = ir.Function(module, llvm, symbol)
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    value = body(b, list(function.args))
    if value is None:
        b.ret_void()
    else:
        b.ret(value)
    return function


def along(
    b: ir.IRBuilder,
    length: ir.Value,
    step: int,
    start: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value], Mask | None], list[ir.Value]],
    stretch: int = 1,
    ahead: Callable[[ir.Value], None] | None = None,
) -> list[ir.Value]:
    """Runs ``body(offset, sums, mask)`` over ``length`` elements, ``step`` at a time, the rest with a mask.

    Whole steps are taken ``stretch`` at a time, as long as there are so many, each time behind ``ahead(offset)``.
    """
    whole = b.and_(length, I64(-step))
    rounds = [(whole, 1, False), (length, 1, True)]
    if stretch > 1:
        rounds.insert(0, (b.and_(length, I64(-step * stretch)), stretch, False))
    first: ir.Value = I64(0)
    for end, steps, masked in rounds:
        before, loop, after = b.block, b.append_basic_block("along"), b.append_basic_block("done")
        b.cbranch(b.icmp_signed("<", first, end), loop, after)
        b.position_at_end(loop)
        offset = b.phi(I64)
        sums = [b.phi(value.type) for value in start]
        mask = mask_below(b, b.sub(length, offset), step) if masked else None
        if ahead is not None and steps == stretch and not masked:
            ahead(offset)
        new: list[ir.Value] = sums
        for i in range(steps):
            new = body(b.add(offset, I64(i * step)), new, mask)
        following = b.add(offset, I64(steps * step))
        last = b.block
        b.cbranch(b.icmp_signed("<", following, end), loop, after)
        for phi, initial, value in ((offset, first, following), *zip(sums, start, new, strict=True)):
            phi.add_incoming(initial, before)
            phi.add_incoming(value, last)
        b.position_at_end(after)
        results = []
        for initial, value in zip(start, new, strict=True):
            result = b.phi(value.type)
            result.add_incoming(initial, before)
            result.add_incoming(value, last)
            results.append(result)
        start, first = results, end
    return start


def _rows(b: ir.IRBuilder, base: ir.Value, stride: ir.Value, count: int) -> list[ir.Value]:
    return [b.gep(base, [b.mul(stride, I64(i))]) for i in range(count)]


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


def _store_totals(b: ir.IRBuilder, sums: list[ir.Value], row: ir.Value, scales: list[ir.Value] | None = None) -> None:
    """Writes the total of every sum, times its scale, one after another."""
    if len(sums) == 4:
        value = totals(b, sums)
        if scales is not None:
            factors = ir.Constant(value.type, ir.Undefined)
            for i, scale in enumerate(scales):
                factors = b.insert_element(factors, scale, I32(i))
            value = b.fmul(value, factors)
        store(b, value, row, I64(0))
        return
    for i, vector in enumerate(sums):
        value = total(b, vector)
        b.store(value if scales is None else b.fmul(value, scales[i]), b.gep(row, [I64(i)]))


@cache
def dot_tile(weight_rows: int, rows: int, bfloat16: bool = False) -> Kernel:
    """``(w, ldw, x, ldx, k, y, ldy, ahead)``: ``y[t, n] = Σ_k w[n, k] x[t, k]`` in fp32 for ``weight_rows`` n and
    ``rows`` t. With ``bfloat16``, ``w`` is; it widens to fp32 exactly.

    While it reads a weight it asks for the one ``ahead`` numbers behind it, which may be ``weight_rows * ldw``, that of
    the next tile: whoever walks down the rows of a matrix reads its memory from front to back. 0 asks for nothing new.
    """

    def body(b: ir.IRBuilder, args: list[ir.Value]) -> None:
        w, ldw, x, ldx, k, y, ldy, ahead = args
        ws = _rows(b, pointer(b, w, I16 if bfloat16 else F32), ldw, weight_rows)
        xs = _rows(b, pointer(b, x, F32), ldx, rows)

        def step(offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
            def read(base: ir.Value, kind: ir.VectorType) -> ir.Value:
                return load(b, base, offset, kind) if mask is None else load_masked(b, base, offset, kind, mask)

            vectors = [read(row, FLOATS) for row in xs]
            new = []
            for i, row in enumerate(ws):
                weights = widen(b, read(row, HALVES)) if bfloat16 else read(row, FLOATS)
                new += [fma(b, weights, vector, sums[i * rows + j]) for j, vector in enumerate(vectors)]
            return new

        zeros = [splat(FLOATS, 0.0)] * (weight_rows * rows)
        stretch = CACHE_LINE // (LANES * (2 if bfloat16 else 4))
        sums = along(b, k, LANES, zeros, step, stretch, _look_ahead(b, ws, ahead))
        for j, row in enumerate(_rows(b, pointer(b, y, F32), ldy, rows)):
            _store_totals(b, [sums[i * rows + j] for i in range(weight_rows)], row)

    return tile(f"dot_{'bfloat16_' if bfloat16 else ''}{weight_rows}_{rows}", 8, body)


@cache
def dot_tile_int8(weight_rows: int, rows: int) -> Kernel:
    """``(w, ldw, x, ldx, k, y, ldy, w_scale, x_scale, ahead)``: as `dot_tile`, ``y[t, n] = w_scale[n] x_scale[t] Σ_k
    w[n, k] x[t, k]``.

    ``w`` is int8, ``x`` int16, the sum exact in int32: 16-bit activations cost no more than 8-bit ones, because the
    CPU multiplies pairs of 16 bits either way. The caller keeps ``|x|`` small enough for k (see `largest_activation`).
    """

    def body(b: ir.IRBuilder, args: list[ir.Value]) -> None:
        w, ldw, x, ldx, k, y, ldy, w_scale, x_row_scale, ahead = args
        ws = _rows(b, pointer(b, w, I8), ldw, weight_rows)
        xs = _rows(b, pointer(b, x, I16), ldx, rows)

        def step(offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
            def read(base: ir.Value, kind: ir.VectorType) -> ir.Value:
                return load(b, base, offset, kind) if mask is None else load_masked(b, base, offset, kind, mask)

            vectors = [read(row, SHORTS) for row in xs]
            new = []
            for i, row in enumerate(ws):
                weights = b.sext(read(row, BYTES), SHORTS)
                products = [multiply_pairs(b, weights, vector) for vector in vectors]
                new += [b.add(sums[i * rows + j], product) for j, product in enumerate(products)]
            return new

        zeros = [splat(INTS, 0)] * (weight_rows * rows)
        sums = along(b, k, 2 * LANES, zeros, step, CACHE_LINE // (2 * LANES), _look_ahead(b, ws, ahead))
        w_scales, x_scales = pointer(b, w_scale, F32), pointer(b, x_row_scale, F32)
        for j, row in enumerate(_rows(b, pointer(b, y, F32), ldy, rows)):
            x_scale = b.load(b.gep(x_scales, [I64(j)]))
            scales = [b.fmul(b.load(b.gep(w_scales, [I64(i)])), x_scale) for i in range(weight_rows)]
            floats = [b.sitofp(sums[i * rows + j], FLOATS) for i in range(weight_rows)]
            _store_totals(b, floats, row, scales)

    return tile(f"dot_int8_{weight_rows}_{rows}", 10, body)


@cache
def dot_tile_int4(weight_rows: int, rows: int) -> Kernel:
    """``(w, ldw, x, ldx, k, y, ldy, w_scale, w_middle, x_scale, x_sum, groups, ahead)``: as `dot_tile` for weights of 4
    bits, ``w_scale[n, g] (w[n, k] - 8) + w_middle[n, g]`` with g = k / 32, see `model.linear.Matrix`.

    Row n of ``w`` begins ``n ⌈ldw / 2⌉`` bytes behind it. ``x`` is int16, each row times ``x_scale[t]``, and ``x_sum[t,
    g]`` are the sums of its groups as floats: what the middles are multiplied with. Rows of all four tables have length
    ``groups``. The 32 products that share a scale are summed exactly, groups in fp32.
    """

    def body(b: ir.IRBuilder, args: list[ir.Value]) -> None:
        w, ldw, x, ldx, k, y, ldy, w_scale, w_middle, x_row_scale, x_sum, groups, ahead = args
        half = b.lshr(b.add(ldw, I64(1)), I64(1))
        ws = _rows(b, pointer(b, w, I8), half, weight_rows)
        xs = _rows(b, pointer(b, x, I16), ldx, rows)
        group_scales = _rows(b, pointer(b, w_scale, F32), groups, weight_rows)
        group_middles = _rows(b, pointer(b, w_middle, I16), groups, weight_rows)
        group_sums = _rows(b, pointer(b, x_sum, F32), groups, rows)

        def step(offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
            at, group = b.lshr(offset, I64(1)), b.lshr(offset, I64(5))
            if mask is None:
                vectors = [load(b, row, offset, SHORTS) for row in xs]
            else:
                vectors = [load_masked(b, row, offset, SHORTS, mask) for row in xs]
                pairs = mask_below(b, b.lshr(b.add(b.sub(k, offset), I64(1)), I64(1)), LANES)
            new = []
            for i, (row, scales) in enumerate(zip(ws, group_scales, strict=True)):
                packed = load(b, row, at, QUARTERS) if mask is None else load_masked(b, row, at, QUARTERS, pairs)
                weights = unpack(b, packed)
                scale = spread(b, b.load(b.gep(scales, [group])), FLOATS)
                for j, vector in enumerate(vectors):
                    products = b.sitofp(multiply_pairs(b, weights, vector), FLOATS)
                    new.append(fma(b, products, scale, sums[i * rows + j]))
            return new

        def middle_step(offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
            def read(base: ir.Value, kind: ir.VectorType) -> ir.Value:
                return load(b, base, offset, kind) if mask is None else load_masked(b, base, offset, kind, mask)

            vectors = [read(row, FLOATS) for row in group_sums]
            new = []
            for i, row in enumerate(group_middles):
                middles = widen_half(b, read(row, HALVES))
                new += [fma(b, middles, vector, sums[i * rows + j]) for j, vector in enumerate(vectors)]
            return new

        sums = along(b, groups, LANES, [splat(FLOATS, 0.0)] * (weight_rows * rows), middle_step)
        sums = along(b, k, 2 * LANES, sums, step, CACHE_LINE // LANES, _look_ahead(b, ws, ahead, per_byte=2))
        x_scales = pointer(b, x_row_scale, F32)
        for j, row in enumerate(_rows(b, pointer(b, y, F32), ldy, rows)):
            x_scale = b.load(b.gep(x_scales, [I64(j)]))
            _store_totals(b, [sums[i * rows + j] for i in range(weight_rows)], row, [x_scale] * weight_rows)

    return tile(f"dot_int4_{weight_rows}_{rows}", 13, body)


def largest_activation(k: int) -> int:
    """The largest |x| for which `dot_tile_int8` cannot overflow: a lane adds up about ``k / LANES`` products."""
    return min(32767, (2**31 - 1) // (127 * (k // LANES + 2)))


@cache
def expand_tile(vectors: int, rows: int) -> Kernel:
    """``(h, ldh, m, ldm, k, y, ldy, columns)``: ``y[t, c] += Σ_k h[t, k] m[k, c]`` in fp32 for ``rows`` t.

    With ``vectors`` n it makes n full vectors of columns; with 0 it makes ``columns``, fewer than a vector. Four
    vectors ask for the columns that come next, since rows lie too far apart for the CPU to guess.
    """
    masked, vectors = vectors == 0, max(vectors, 1)

    def body(b: ir.IRBuilder, args: list[ir.Value]) -> None:
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
                part = load(b, row, o, FLOATS) if mask is None else load_masked(b, row, o, FLOATS, mask)
                for j, factor in enumerate(factors):
                    new[j * vectors + i] = fma(b, factor, part, sums[j * vectors + i])
            return new

        sums = along(b, k, 1, [splat(FLOATS, 0.0)] * (vectors * rows), step)
        for j, row in enumerate(_rows(b, pointer(b, y, F32), ldy, rows)):
            for i, offset in enumerate(offsets):
                if mask is None:
                    store(b, b.fadd(load(b, row, offset, FLOATS), sums[j * vectors + i]), row, offset)
                else:
                    old = load_masked(b, row, offset, FLOATS, mask)
                    store_masked(b, b.fadd(old, sums[j * vectors + i]), row, offset, mask)

    return tile(f"expand_{0 if masked else vectors}_{rows}", 8, body)


def _exp_sum(b: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    s, n, shift = args
    scores = pointer(b, s, F32)
    shifts = spread(b, b.load(pointer(b, shift, F32)), FLOATS)

    def step(offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
        if mask is None:
            value = exp(b, b.fsub(load(b, scores, offset, FLOATS), shifts))
            store(b, value, scores, offset)
        else:
            value = exp(b, b.fsub(load_masked(b, scores, offset, FLOATS, mask), shifts))
            value = b.select(mask.lanes, value, splat(FLOATS, 0.0))
            store_masked(b, value, scores, offset, mask)
        return [b.fadd(sums[0], value)]

    return total(b, along(b, n, LANES, [splat(FLOATS, 0.0)], step)[0])


exp_sum = tile("exp_sum", 3, _exp_sum, types.float32)
"""``(s, n, shift)``: ``s[i] = e^(s[i] - shift[0])`` in place for n floats; returns their sum."""


def _silu_multiply(b: ir.IRBuilder, args: list[ir.Value]) -> None:
    gate, up, y, n = args
    gates, ups, out = (pointer(b, address, F32) for address in (gate, up, y))
    ones = splat(FLOATS, 1.0)

    def step(offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
        if mask is None:
            g, u = load(b, gates, offset, FLOATS), load(b, ups, offset, FLOATS)
        else:
            g, u = (load_masked(b, base, offset, FLOATS, mask) for base in (gates, ups))
        value = b.fmul(b.fdiv(g, b.fadd(ones, exp(b, b.fneg(g)))), u)
        if mask is None:
            store(b, value, out, offset)
        else:
            store_masked(b, value, out, offset, mask)
        return []

    along(b, n, LANES, [], step)


silu_multiply = tile("silu_multiply", 4, _silu_multiply)
"""``(gate, up, y, n)``: ``y[i] = silu(gate[i]) up[i]`` for n floats."""


def _atomic_add(b: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    where, amount = args
    return b.atomic_rmw("add", pointer(b, where, I64), amount, "acq_rel")


atomic_add = tile("atomic_add", 2, _atomic_add, types.int64, shared=False)
"""``(where, amount)``: adds to the int64 at ``where``; returns what was there."""


def _atomic_load(b: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    return b.load_atomic(pointer(b, args[0], I64), "acquire", 8)


atomic_load = tile("atomic_load", 1, _atomic_load, types.int64, shared=False)
"""``(where)``: the int64 at ``where`` and whatever its writer wrote before it."""


def _yield(b: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    return b.sext(call(b, "sched_yield", I32), I64)


yield_core = tile("yield_core", 0, _yield, types.int64, shared=False)
"""``()``: lets another thread run on this core."""


def _as_pointer(b: ir.IRBuilder, args: list[ir.Value]) -> ir.Value:
    return pointer(b, args[0], I8)


as_pointer = tile("as_pointer", 1, _as_pointer, types.voidptr, shared=False)
"""``(address)``: as what `numba.carray` takes."""

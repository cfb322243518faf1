"""Pages of small integers as floats, one head's keys or values at a time (see `kv.formats`): into a few kilobytes of
scratch when it is their turn. In fp32 and in a fixed order, so a number does not depend on who asks for it."""

from __future__ import annotations

from llvmlite import ir

from chunkwise.model.kernels.tiles import Kernel, along, tile
from chunkwise.model.kernels.vector import (
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
    Mask,
    fma,
    load,
    load_masked,
    pointer,
    splat,
    spread,
    store,
    store_masked,
    widen,
)

_MIDDLE = 7.5


def _read(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, kind: ir.VectorType, mask: Mask | None) -> ir.Value:
    return load(b, base, offset, kind) if mask is None else load_masked(b, base, offset, kind, mask)


def _write(b: ir.IRBuilder, value: ir.Value, base: ir.Value, offset: ir.Value, mask: Mask | None) -> None:
    if mask is None:
        store(b, value, base, offset)
    else:
        store_masked(b, value, base, offset, mask)


def _scalar(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """The bf16 number at ``base[offset]`` in every lane."""
    bits = b.shl(b.zext(b.load(b.gep(base, [offset])), I32), I32(16))
    return spread(b, b.bitcast(bits, F32), FLOATS)


def _base(b: ir.IRBuilder, scale: ir.Value, middle: ir.Value) -> ir.Value:
    """What level 0 of four bits stands for."""
    return fma(b, scale, splat(FLOATS, -_MIDDLE), middle)


def _int8(b: ir.IRBuilder, source: ir.Value, at: ir.Value, mask: Mask | None) -> ir.Value:
    return b.sitofp(b.sext(_read(b, source, at, QUARTERS, mask), INTS), FLOATS)


def _int4(b: ir.IRBuilder, source: ir.Value, at: ir.Value, mask: Mask | None) -> tuple[ir.Value, ir.Value]:
    both = b.zext(_read(b, source, at, QUARTERS, mask), INTS)
    low, high = b.and_(both, splat(INTS, 15)), b.lshr(both, splat(INTS, 4))
    return b.sitofp(low, FLOATS), b.sitofp(high, FLOATS)


def _keys_int8(b: ir.IRBuilder, args: list[ir.Value]) -> None:
    q, rows, dim, scales, _, out = args
    source, target, factors = pointer(b, q, I8), pointer(b, out, F32), pointer(b, scales, F32)

    def column(offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
        scale = _read(b, factors, offset, FLOATS, mask)

        def row(index: ir.Value, inner: list[ir.Value], unused: Mask | None) -> list[ir.Value]:
            at = b.add(b.mul(index, dim), offset)
            _write(b, b.fmul(_int8(b, source, at, mask), scale), target, at, mask)
            return []

        along(b, rows, 1, [], row)
        return []

    along(b, dim, LANES, [], column)


def _values_int8(b: ir.IRBuilder, args: list[ir.Value]) -> None:
    q, rows, dim, scales, _, out = args
    source, target, factors = pointer(b, q, I8), pointer(b, out, F32), pointer(b, scales, F32)

    def row(index: ir.Value, sums: list[ir.Value], unused: Mask | None) -> list[ir.Value]:
        scale, start = spread(b, b.load(b.gep(factors, [index])), FLOATS), b.mul(index, dim)

        def column(offset: ir.Value, inner: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
            at = b.add(start, offset)
            _write(b, b.fmul(_int8(b, source, at, mask), scale), target, at, mask)
            return []

        along(b, dim, LANES, [], column)
        return []

    along(b, rows, 1, [], row)


def _keys_int4(b: ir.IRBuilder, args: list[ir.Value]) -> None:
    q, rows, dim, scales, middles, out = args
    source, target = pointer(b, q, I8), pointer(b, out, F32)
    factors, centres, half = pointer(b, scales, I16), pointer(b, middles, I16), b.lshr(dim, I64(1))

    def column(offset: ir.Value, sums: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
        places = (offset, b.add(offset, half))
        steps = [widen(b, _read(b, factors, place, HALVES, mask)) for place in places]
        middle = [widen(b, _read(b, centres, place, HALVES, mask)) for place in places]
        bases = [_base(b, *pair) for pair in zip(steps, middle, strict=True)]

        def row(index: ir.Value, inner: list[ir.Value], unused: Mask | None) -> list[ir.Value]:
            levels = _int4(b, source, b.add(b.mul(index, half), offset), mask)
            start = b.mul(index, dim)
            for level, step, base, place in zip(levels, steps, bases, places, strict=True):
                _write(b, fma(b, level, step, base), target, b.add(start, place), mask)
            return []

        along(b, rows, 1, [], row)
        return []

    along(b, half, LANES, [], column)


def _values_int4(b: ir.IRBuilder, args: list[ir.Value]) -> None:
    q, rows, dim, scales, middles, out = args
    source, target = pointer(b, q, I8), pointer(b, out, F32)
    factors, centres, half = pointer(b, scales, I16), pointer(b, middles, I16), b.lshr(dim, I64(1))

    def row(index: ir.Value, sums: list[ir.Value], unused: Mask | None) -> list[ir.Value]:
        step = _scalar(b, factors, index)
        base, start = _base(b, step, _scalar(b, centres, index)), b.mul(index, dim)

        def column(offset: ir.Value, inner: list[ir.Value], mask: Mask | None) -> list[ir.Value]:
            levels = _int4(b, source, b.add(b.mul(index, half), offset), mask)
            for level, place in zip(levels, (offset, b.add(offset, half)), strict=True):
                _write(b, fma(b, level, step, base), target, b.add(start, place), mask)
            return []

        along(b, half, LANES, [], column)
        return []

    along(b, rows, 1, [], row)


widen_keys_int8: Kernel = tile("widen_keys_int8", 6, _keys_int8)
"""``(q, rows, dim, scales, _, out)``: ``out[t, d] = q[t, d] scales[d]`` with int8 ``q`` and fp32 scales."""
widen_values_int8: Kernel = tile("widen_values_int8", 6, _values_int8)
"""The same with ``scales[t]``."""
widen_keys_int4: Kernel = tile("widen_keys_int4", 6, _keys_int4)
"""``(q, rows, dim, scales, middles, out)``: ``out[t, d] = middles[d] + (q[t, d] - 7.5) scales[d]`` with packed ``q``
(see `kv.formats.pack_int4`), bf16 scales and middles, and even ``dim``."""
widen_values_int4: Kernel = tile("widen_values_int4", 6, _values_int4)
"""The same with ``scales[t]`` and ``middles[t]``."""

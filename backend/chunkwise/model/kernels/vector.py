"""LLVM IR building blocks: vectors as wide as this CPU's registers, masked ends, exp. Used by `tiles` only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()

_FEATURES = llvmlite.binding.get_host_cpu_features()
WIDE = bool(_FEATURES.get("avx512f") and _FEATURES.get("avx512bw"))
"""Whether the CPU has 32 registers of 512 bits, else 16 of 256 are assumed."""
LANES = 16 if WIDE else 8
"""Floats per vector."""
AVX2 = bool(_FEATURES.get("avx2"))

FLOATS = ir.VectorType(F32, LANES)
INTS = ir.VectorType(I32, LANES)
BYTES = ir.VectorType(I8, 2 * LANES)
SHORTS = ir.VectorType(I16, 2 * LANES)
HALVES = ir.VectorType(I16, LANES)
QUARTERS = ir.VectorType(I8, LANES)

_SUFFIX = {
    FLOATS: f"v{LANES}f32",
    BYTES: f"v{2 * LANES}i8",
    SHORTS: f"v{2 * LANES}i16",
    HALVES: f"v{LANES}i16",
    QUARTERS: f"v{LANES}i8",
}


def call(b: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Calls the LLVM intrinsic or C function ``name``."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def pointer(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """An integer address as a pointer."""
    return b.inttoptr(address, kind.as_pointer())


def splat(kind: ir.VectorType, value: float) -> ir.Constant:
    """A constant vector."""
    return ir.Constant(kind, [value] * kind.count)


def spread(b: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    """A scalar in every lane."""
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), splat(ir.VectorType(I32, kind.count), 0))


def load(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, kind: ir.VectorType) -> ir.Value:
    """The vector at ``base[offset]``, unaligned."""
    value = b.load(b.bitcast(b.gep(base, [offset]), kind.as_pointer()))
    value.align = 1
    return value


def store(b: ir.IRBuilder, value: ir.Value, base: ir.Value, offset: ir.Value) -> None:
    """Writes a vector to ``base[offset]``, unaligned."""
    b.store(value, b.bitcast(b.gep(base, [offset]), value.type.as_pointer())).align = 1


class Mask(NamedTuple):
    """The first ``count`` lanes of a vector: ``lanes`` is True there."""

    lanes: ir.Value
    count: ir.Value


def mask_below(b: ir.IRBuilder, count: ir.Value, lanes: int) -> Mask:
    """The first ``count`` of ``lanes`` lanes."""
    kind = ir.VectorType(I32, lanes)
    below = b.icmp_signed("<", ir.Constant(kind, list(range(lanes))), spread(b, b.trunc(count, I32), kind))
    return Mask(below, count)


def load_masked(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, kind: ir.VectorType, mask: Mask) -> ir.Value:
    """As `load`, with zeros outside the mask and no access there."""
    where = b.bitcast(b.gep(base, [offset]), kind.as_pointer())
    zeros = splat(kind, 0.0 if kind is FLOATS else 0)
    if WIDE or kind.element is F32:
        return call(b, f"llvm.masked.load.{_SUFFIX[kind]}.p0", kind, where, I32(1), mask.lanes, zeros)
    # AVX2 has no masks for small numbers: LLVM would branch for every lane, and take a minute longer over it.
    whole = cgutils.alloca_once(b, kind)
    b.store(zeros, whole)
    cgutils.raw_memcpy(b, whole, where, mask.count, kind.element.width // 8)
    return b.load(whole)


def store_masked(b: ir.IRBuilder, value: ir.Value, base: ir.Value, offset: ir.Value, mask: Mask) -> None:
    """As `store`, inside the mask."""
    where = b.bitcast(b.gep(base, [offset]), value.type.as_pointer())
    call(b, f"llvm.masked.store.{_SUFFIX[value.type]}.p0", ir.VoidType(), value, where, I32(1), mask.lanes)


def prefetch(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> None:
    """Asks for the cache line of ``base[offset]``; harmless where that does not exist."""
    call(
        b, "llvm.prefetch.p0", ir.VoidType(), b.bitcast(b.gep(base, [offset]), I8.as_pointer()), I32(0), I32(3), I32(1)
    )


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """``x * y + z``."""
    return call(b, f"llvm.fmuladd.{_SUFFIX[FLOATS]}", FLOATS, x, y, z)


def widen(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """bf16, as `HALVES`, to `FLOATS`: they are the upper halves of floats."""
    return b.bitcast(b.shl(b.zext(value, INTS), splat(INTS, 16)), FLOATS)


def unpack(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Two numbers of 4 bits per byte, as `QUARTERS`, to `SHORTS` less 8: the low bits of a byte come first."""
    wide = b.zext(value, INTS)
    both = b.and_(b.or_(wide, b.shl(wide, splat(INTS, 12))), splat(INTS, 0x000F000F))
    return b.sub(b.bitcast(both, SHORTS), splat(SHORTS, 8))


def widen_half(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """fp16, as `HALVES`, to `FLOATS`."""
    return b.fpext(b.bitcast(value, ir.VectorType(ir.HalfType(), LANES)), FLOATS)


def total(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Sum of a float vector's lanes, halves added to halves."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        value = b.fadd(*(_pick(b, value, value, range(first, first + lanes)) for first in (0, lanes)))
    return b.extract_element(value, I32(0))


def totals(b: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    """`total` of each of four vectors, to the bit, as a vector of four: cheaper than one by one."""
    quarters = []
    for value in values:
        lanes = value.type.count
        while lanes > 4:
            lanes //= 2
            value = b.fadd(*(_pick(b, value, value, range(first, first + lanes)) for first in (0, lanes)))
        quarters.append(value)
    pairs = [
        b.fadd(_pick(b, left, right, (0, 1, 4, 5)), _pick(b, left, right, (2, 3, 6, 7)))
        for left, right in ((quarters[0], quarters[1]), (quarters[2], quarters[3]))
    ]
    return b.fadd(_pick(b, pairs[0], pairs[1], (0, 2, 4, 6)), _pick(b, pairs[0], pairs[1], (1, 3, 5, 7)))


def _pick(b: ir.IRBuilder, left: ir.Value, right: ir.Value, order: Sequence[int]) -> ir.Value:
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, len(order)), list(order)))


def multiply_pairs(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """`SHORTS` times `SHORTS`, neighbouring products added: `INTS`."""
    if WIDE:
        return call(b, "llvm.x86.avx512.pmaddw.d.512", INTS, x, y)
    if AVX2:
        return call(b, "llvm.x86.avx2.pmadd.wd", INTS, x, y)
    wide, nothing = ir.VectorType(I32, 2 * LANES), ir.Constant(ir.VectorType(I32, 2 * LANES), ir.Undefined)
    products = b.mul(b.sext(x, wide), b.sext(y, wide))
    even, odd = (ir.Constant(INTS, list(range(first, 2 * LANES, 2))) for first in (0, 1))
    return b.add(b.shuffle_vector(products, nothing, even), b.shuffle_vector(products, nothing, odd))


_EXP_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e to ``x`` in fp32 to about 2 units in the last place: ``2^n · p(r)`` with ``x = n ln 2 + r`` and Cephes'
    polynomial. Below -87 it gives e^-87, above 88 e^88; NaN stays NaN."""
    for limit, outside in ((-87.0, "<"), (88.0, ">")):
        bound = splat(FLOATS, limit)
        x = b.select(b.fcmp_ordered(outside, x, bound), bound, x)
    n = call(b, f"llvm.rint.{_SUFFIX[FLOATS]}", FLOATS, b.fmul(x, splat(FLOATS, 1.4426950408889634)))
    r = fma(b, n, splat(FLOATS, -0.693359375), x)
    r = fma(b, n, splat(FLOATS, 2.12194440e-4), r)
    p = splat(FLOATS, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        p = fma(b, p, r, splat(FLOATS, term))
    p = fma(b, p, b.fmul(r, r), b.fadd(r, splat(FLOATS, 1.0)))
    whole = b.select(b.fcmp_ordered("ord", n, n), n, splat(FLOATS, 0.0))
    power = b.shl(b.add(b.fptosi(whole, INTS), splat(INTS, 127)), splat(INTS, 23))
    return b.fmul(p, b.bitcast(power, FLOATS))

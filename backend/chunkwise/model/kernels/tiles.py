"""Inner loops as functions that numba code calls with plain integer addresses: how one is made, and the small ones; the
matrix products' are in `tile_products`. Ends that do not fill a vector are masked, so any size works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from chunkwise.model.kernels.library import offer
from chunkwise.model.kernels.vector import (
    F32,
    FLOATS,
    I8,
    I32,
    I64,
    LANES,
    Mask,
    call,
    exp,
    load,
    load_masked,
    mask_below,
    pointer,
    splat,
    spread,
    store,
    store_masked,
    total,
)

Body = Callable[[ir.IRBuilder, list[ir.Value]], "ir.Value | None"]
Kernel = Callable[..., Any]


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


def by_rows(name: str, arguments: int, bodies: Sequence[Body]) -> Kernel:
    """A tile of ``arguments`` int64 and one more behind them, the number of rows, which chooses among ``bodies``: the
    first is for one row, the last for as many as there are bodies."""
    kinds = [(f"chunkwise_{name}_{rows}", body) for rows, body in enumerate(bodies, start=1)]

    def choose(b: ir.IRBuilder, args: list[ir.Value]) -> None:
        llvm = ir.FunctionType(_LLVM[types.void], [I64] * arguments)
        blocks = [b.append_basic_block(symbol) for symbol, _ in kinds]
        switch = b.switch(args[-1], blocks[-1])
        for rows, (block, (symbol, body)) in enumerate(zip(blocks, kinds, strict=True), start=1):
            b.position_at_end(block)
            b.call(_define(b.module, symbol, llvm, body), args[:-1], tail=True)
            if rows < len(kinds):
                b.ret_void()
                switch.add_case(I64(rows), block)

    return tile(name, arguments + 1, choose)


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

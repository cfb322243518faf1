"""Compiles every Triton kernel to machine code for a compute capability, without a device, and prints a line for each.

    python tests/compile_kernels.py 80 [bf16 fp16 fp32]

Needs a process of its own: kernels are bound to the interpreter or to the compiler when they are imported.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from chunkwise.model.paged_decode import attend, merge
from chunkwise_adapters.ops.triton import expand, shrink

# Everything that is neither a size (constexpr) nor one of these is an int32 number.
POINTERS = {
    "fp32": {"h", "weights", "partial", "statistics", "entropy", "key_scales_8", "value_scales_8"},
    "i32": {"tiles", "rows", "rungs", "numbers", "contexts"},
    "i64": {"factors"},
    "i8": {"keys_8", "values_8", "formats"},
    "u8": {"keys_4", "values_4"},
    "bf16": {"key_scales_4", "value_scales_4", "key_middles_4", "value_middles_4"},
    "model": {"x", "y", "q", "keys", "values", "out"},
}
TILES = ({"ROWS": 16, "SPLITS": 8}, {"ROWS": 64, "SPLITS": 1})
LORA = {"RANKS": 16, "UPCAST": False}
STRIDES = {"FULL_STRIDE": 184320, "BYTES_8": 214080, "BYTES_4": 122880}
ATTEND = {"KV": 3, "GROUP": 3, "DIM": 64, "PAGE": 16, "SPLITS": 16, "TOKENS": 32, "GROUP_BLOCK": 16, "DIM_BLOCK": 64}
ATTEND |= STRIDES
CASES: list[tuple[Any, dict[str, Any]]] = [
    *((shrink, {**LORA, **tile, "INPUTS": 64}) for tile in TILES),
    *((expand, {**LORA, **tile, "OUTPUTS": 64}) for tile in TILES),
    *((attend, {**ATTEND, "MIXED": mixed, "UPCAST": False}) for mixed in (False, True)),
    (merge, {"DIM": 64, "SPLITS": 16, "DIM_BLOCK": 64}),
]


def signature(kernel: Any, sizes: dict[str, Any], dtype: str) -> dict[str, str]:
    """Triton's type of every argument."""
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(sizes, "constexpr")
    for kind, names in POINTERS.items():
        types |= dict.fromkeys(names & types.keys(), f"*{dtype if kind == 'model' else kind}")
    return {name: "fp32" if name == "scale" else kind for name, kind in types.items()}


def main(capability: int, types: list[str]) -> None:
    """Raises whatever the compiler raises."""
    for kernel, sizes in CASES:
        for dtype in types:
            source = ASTSource(fn=kernel, signature=signature(kernel, sizes, dtype), constexprs=sizes)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            print(kernel.__name__, dtype, len(compiled.asm["cubin"]), compiled.metadata.shared)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or ["bf16", "fp16", "fp32"])

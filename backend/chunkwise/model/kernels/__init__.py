"""CPU kernels, compiled at first use by numba (LLVM) and kept on disk; the user needs no compiler.

`vector` and `tiles` write LLVM IR for the few inner loops that decide the speed, so that it does not hang on what an
auto-vectoriser makes of Python loops. `blocks` puts them together to a decoder layer. Every output element is summed in
an order that depends on its own row alone, never on how many rows share the step, so a request's numbers do not change
with its company.
"""

"""Tiles compiled once, as one library that all kernels call.

numba builds whatever a function calls into that function, and again into each of its callers, up to the entry; for the
tiles that would be a dozen times a few seconds. So kernels only declare them, and `link` brings their code into the
process before the first entry runs: from disk, or compiled.
"""

from __future__ import annotations

import hashlib
import pickle
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llvmlite import ir
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

# Tiles are made when modules are imported, and numba offers no object of ours to hang them on.
_waiting: dict[str, Callable[[ir.Module], object]] = {}


def offer(name: str, define: Callable[[ir.Module], object]) -> None:
    """Has the next `link` add the function ``name``, which ``define`` writes into a module."""
    _waiting[name] = define


def link(folder: Path) -> None:
    """Makes every function that was offered callable by compiled code; machine code is kept in ``folder``."""
    if not _waiting:
        return
    with global_compiler_lock:
        names = sorted(_waiting)
        if not names:
            return
        codegen = cpu_target.target_context.codegen()
        digest = hashlib.blake2b(repr((names, codegen.magic_tuple())).encode(), digest_size=8).hexdigest()
        file = folder / f"tiles-{digest}"
        try:
            codegen.unserialize_library(pickle.loads(file.read_bytes()))
        except (OSError, EOFError, pickle.UnpicklingError):
            library = codegen.create_library("chunkwise_tiles")
            library.enable_object_caching()
            module = library.create_ir_module("chunkwise_tiles")
            for name in names:
                _waiting[name](module)
            library.add_ir_module(module)
            library.finalize()
            # Without a folder to write to, the next process compiles again.
            with suppress(OSError):
                _write(file, pickle.dumps(library.serialize_using_object_code()))
        for name in names:
            del _waiting[name]


def _write(file: Path, data: bytes) -> None:
    """At once or not at all: other processes may be doing the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)

"""How kernels are compiled: to run without the interpreter lock, and kept on disk under a name that is their source's.

numba notices when a kernel's own file changes, not when a file does whose code was built into it; so the cache folder
is named after all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numba

from chunkwise.model.kernels.library import link

_FOLDER = Path(__file__).parent


def _cache_folder(configured: str | None) -> Path:
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for source in sorted(_FOLDER.glob("*.py")):
        digest.update(source.read_bytes())
    return Path(configured or Path.home() / ".cache" / "chunkwise" / "kernels") / digest.hexdigest()


# Read by numba when a function is decorated, so it has to be set before the first kernel is.
_CACHE = _cache_folder(numba.config.CACHE_DIR)
numba.config.CACHE_DIR = str(_CACHE)

# Sums may be reordered and fused, but NaN and infinity keep their meaning: the shard looks for them in the logits.
_FAST = {"reassoc", "contract", "arcp", "nsz"}


_OPTIONS = {"nogil": True, "fastmath": _FAST, "cache": True, "error_model": "numpy", "boundscheck": False}


def kernel(function: Callable[..., Any]) -> Any:
    """A function for other kernels to call; compiled with the first that does."""
    return numba.njit(**_OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def entry(function: Callable[..., Any]) -> Any:
    """A kernel that Python calls; compiled at the first call."""
    compiled = numba.njit(**_OPTIONS, no_cfunc_wrapper=True)(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        link(_CACHE)
        return compiled(*args)

    return call

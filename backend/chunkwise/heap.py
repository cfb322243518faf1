"""The C library's heap of this process."""

from __future__ import annotations

import ctypes

# glibc has it, other C libraries may not.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_heap() -> None:
    """Returns memory that was freed to the system. The C library would keep most of it for later, so this is worth its
    milliseconds after work that took much and will not come again."""
    if _trim is not None:
        _trim(0)

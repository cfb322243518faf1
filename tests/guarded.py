"""What shows that a kernel touched memory that is not its own."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

GUARD = np.float32(-12345.0)
"""Stands around what a kernel may write."""


def memory_end() -> int:
    """The address behind the end of zeroed memory that is followed by none: one access behind it would kill the test
    run. The memory is never freed."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 2 * page
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), no_access) == 0
    _kept.append(memory)
    return end


_kept: list[mmap.mmap] = []

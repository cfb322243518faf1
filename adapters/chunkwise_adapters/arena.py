"""CPU memory for what every step reads."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_SLAB = 64 << 20


class Arena:
    """Matrices side by side in huge pages: with small ones, reading them all at every step waits for the page table.

    What is left of a slab is never touched and takes no memory; a slab lives as long as a matrix in it.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised matrix ``[rows, columns]``, contiguous."""
        size = rows * columns * dtype.itemsize
        # A multiple of a cache line, so that the next matrix begins on one.
        taken = -(-size // 64) * 64
        if taken > self._slab.numel():
            memory = mmap.mmap(-1, max(taken, _SLAB), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            self._slab = torch.frombuffer(memory, dtype=torch.uint8)
        part, self._slab = self._slab[:size], self._slab[taken:]
        return part.view(dtype).view(rows, columns)

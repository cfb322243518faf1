"""A file for tensors that memory has no room for, of one process alone.

It has no name: nobody else can open or replace it, so what is read is what was written and needs no check, and the
system frees it when the process ends, however it ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor


class SpillFile:
    """Lists of tensors one after another. What was written stays until the object goes, and the file with it.

    Raises:
        OSError: ``directory`` cannot be made, or no file in it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        finalize(self, self._file.close)
        self._end = 0

    def write(self, tensors: Iterable[Tensor]) -> int:
        """Append contiguous tensors; their offset, for `read`. Raises OSError, and then nothing is kept."""
        offset = self._file.seek(self._end)
        for tensor in tensors:
            _transfer(self._file.write, tensor.cpu())
        self._end = self._file.tell()
        return offset

    def read(self, offset: int, tensors: Iterable[Tensor]) -> None:
        """Fill contiguous CPU tensors, of the shapes and types that were written at ``offset``. Raises OSError."""
        self._file.seek(offset)
        for tensor in tensors:
            _transfer(self._file.readinto, tensor)


def _transfer(move: Callable[[memoryview], int | None], tensor: Tensor) -> None:
    """Calls ``move`` with what is left of the tensor's bytes until it has taken all."""
    rest = tensor.view(torch.uint8).view(-1).numpy().data
    while rest:
        moved = move(rest)
        if not moved:
            raise OSError("the file of evicted adapters ended early")
        rest = rest[moved:]

"""A progress bar on standard error: tqdm's if it is installed, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Protocol

try:
    from tqdm import tqdm  # type: ignore[import-untyped]
except ModuleNotFoundError:
    tqdm = None

_SECONDS = 5.0


class Progress(Protocol):
    """Counts items that are done."""

    def update(self, n: int) -> object:
        """``n`` more items are done."""
        ...

    def close(self) -> None:
        """Ends the display."""
        ...


class PlainProgress:
    """Writes a line every few seconds, and at the end."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._done = done
        self._written = time.monotonic()

    def update(self, n: int) -> None:
        """``n`` more items are done."""
        self._done += n
        if time.monotonic() - self._written >= _SECONDS:
            self._write()

    def close(self) -> None:
        """Writes the last line."""
        self._write()

    def _write(self) -> None:
        print(f"{self._done} of {self._total} items", file=sys.stderr, flush=True)
        self._written = time.monotonic()


def open_progress(total: int, done: int) -> Progress:
    """A display of ``total`` items, ``done`` of which an earlier run has finished."""
    if tqdm is None:
        return PlainProgress(total, done)
    bar: Progress = tqdm(total=total, initial=done, unit="item", file=sys.stderr)
    return bar

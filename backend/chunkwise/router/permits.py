"""How many requests may be inside the server at once. Counted from a request's arrival to the end of its response, so a
full server refuses before it does any work, and a client that reads slowly keeps its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from chunkwise.core import Overloaded


class Permits:
    """``limit`` places, fail-fast."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """One place for the length of the block. Raises Overloaded when all are taken."""
        if self.taken >= self._limit:
            raise Overloaded(f"{self.taken} requests are in flight, the limit is {self._limit}; try again later")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

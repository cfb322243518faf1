"""Which page of which format is in use. Integers only: this module knows nothing of tensors."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from chunkwise.core import ChunkwiseError, KvFormat, KvUsage


class OutOfPages(ChunkwiseError):
    """The byte budget of the KV cache is spent."""


class PageRef(NamedTuple):
    """One page of a sequence: its storage format and its number in that format's pool."""

    format: KvFormat
    number: int


class PageAllocator:
    """Pages of several formats over one byte budget.

    The lowest free index is handed out first, so a pool's touched memory never exceeds its own high-water mark. Index 0
    of every pool is never handed out: it stays zero and serves as padding.

    Args:
        page_bytes: bytes of one page per format, over all layers of this shard.
        budget_bytes: the most that all pages together may hold.
    """

    def __init__(self, page_bytes: Mapping[KvFormat, int], budget_bytes: int) -> None:
        self.page_bytes = dict(page_bytes)
        self.budget_bytes = budget_bytes
        self.bytes_held = 0
        self._used: dict[KvFormat, set[int]] = {kind: set() for kind in page_bytes}
        self._returned: dict[KvFormat, list[int]] = {kind: [] for kind in page_bytes}
        self._next: dict[KvFormat, int] = dict.fromkeys(page_bytes, 1)

    def capacity(self, kind: KvFormat) -> int:
        """Pages of this format that would fit the whole budget."""
        return self.budget_bytes // self.page_bytes[kind]

    def free(self, kind: KvFormat) -> int:
        """Pages of this format that still fit the budget."""
        return (self.budget_bytes - self.bytes_held) // self.page_bytes[kind]

    def allocate(self, kind: KvFormat) -> PageRef:
        """One page. Raises OutOfPages when the budget does not hold another."""
        if self.free(kind) < 1:
            raise OutOfPages(
                f"KV cache is full: {self.bytes_held} of {self.budget_bytes} bytes are held; "
                "send fewer or shorter requests at once, or raise --max-batch-total-tokens"
            )
        if self._returned[kind]:
            index = heapq.heappop(self._returned[kind])
        else:
            index = self._next[kind]
            self._next[kind] += 1
        self._used[kind].add(index)
        self.bytes_held += self.page_bytes[kind]
        return PageRef(kind, index)

    def release(self, page: PageRef) -> None:
        """Returns one page to the pool."""
        self._used[page.format].remove(page.number)
        heapq.heappush(self._returned[page.format], page.number)
        self.bytes_held -= self.page_bytes[page.format]

    def usage(self) -> tuple[KvUsage, ...]:
        """Pages in use and bytes held, per format."""
        return tuple(KvUsage(kind, len(used), len(used) * self.page_bytes[kind]) for kind, used in self._used.items())

    def check_integrity(self, tables: Iterable[Iterable[PageRef]]) -> None:
        """Checks that the page tables of all live sequences hold exactly the pages in use, each once.

        Raises AssertionError otherwise: a leak or a page used twice is a bug of ours.
        """
        held = [page for table in tables for page in table]
        assert len(held) == len(set(held)), "a page is used twice"
        assert set(held) == {PageRef(kind, i) for kind, used in self._used.items() for i in used}, "a page has leaked"
        assert self.bytes_held == sum(self.page_bytes[page.format] for page in held)
        assert self.bytes_held <= self.budget_bytes
        for kind, used in self._used.items():
            returned = set(self._returned[kind])
            assert not used & returned
            assert used | returned == set(range(1, self._next[kind]))

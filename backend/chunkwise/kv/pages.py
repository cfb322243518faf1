"""Which page of which format is in use, and by how many holders. Integers only: nothing here knows of tensors."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from chunkwise.core import ChunkwiseError, KvFormat


class OutOfPages(ChunkwiseError):
    """The byte budget of the KV cache is spent."""


class PageRef(NamedTuple):
    """One page of a sequence: its storage format and its number in that format's pool."""

    format: KvFormat
    number: int


class PageAllocator:
    """Pages of several formats over one byte budget. A page may have several holders and is free when the last is gone.

    The lowest free number is handed out first, so a pool's touched memory never exceeds its own high-water mark, and
    what `cool` names is what will be missed last. Number 0 of every pool is never handed out: it stays zero and serves
    as padding.

    Args:
        page_bytes: bytes of one page per format, over all layers of this shard.
        budget_bytes: the most that all pages together may take.
        capacities: the most pages of each format (None: the budget alone counts).
    """

    def __init__(
        self,
        page_bytes: Mapping[KvFormat, int],
        budget_bytes: int,
        capacities: Mapping[KvFormat, int] | None = None,
    ) -> None:
        self.page_bytes = dict(page_bytes)
        self.budget_bytes = budget_bytes
        self._capacities = capacities or {kind: budget_bytes // size for kind, size in page_bytes.items()}
        self.bytes_held = 0
        self._holders: dict[KvFormat, dict[int, int]] = {kind: {} for kind in page_bytes}
        self._returned: dict[KvFormat, list[int]] = {kind: [] for kind in page_bytes}
        self._next: dict[KvFormat, int] = dict.fromkeys(page_bytes, 1)
        self._warm: set[PageRef] = set()
        self._warm_bytes = 0
        self._kept: set[PageRef] = set()
        self._idle: dict[KvFormat, int] = dict.fromkeys(page_bytes, 0)

    def free(self, kind: KvFormat) -> int:
        """Pages of this format that can still be allocated."""
        fitting = (self.budget_bytes - self.bytes_held) // self.page_bytes[kind]
        return min(fitting, self._capacities[kind] - len(self._holders[kind]))

    def room(self, kind: KvFormat) -> int:
        """Pages of this format that could be allocated if all idle pages were given up."""
        idle_bytes = sum(pages * self.page_bytes[idle] for idle, pages in self._idle.items())
        fitting = (self.budget_bytes - self.bytes_held + idle_bytes) // self.page_bytes[kind]
        return min(fitting, self._capacities[kind] - len(self._holders[kind]) + self._idle[kind])

    def pages(self, kind: KvFormat) -> int:
        """Pages of this format that a sequence holds."""
        return len(self._holders[kind]) - self._idle[kind]

    def idle(self, kind: KvFormat) -> int:
        """Pages of this format that are kept for reuse and nobody else holds."""
        return self._idle[kind]

    def holders(self, page: PageRef) -> int:
        """How many hold this page."""
        return self._holders[page.format].get(page.number, 0)

    def allocate(self, kind: KvFormat) -> PageRef:
        """One page with one holder. Raises OutOfPages when the budget does not fit another."""
        if self.free(kind) < 1:
            raise OutOfPages(
                f"KV cache is full: {self.bytes_held} of {self.budget_bytes} bytes are held; "
                "send fewer or shorter requests at once, or raise --max-batch-total-tokens"
            )
        if self._returned[kind]:
            number = heapq.heappop(self._returned[kind])
        else:
            number = self._next[kind]
            self._next[kind] += 1
        page, size = PageRef(kind, number), self.page_bytes[kind]
        self._holders[kind][number] = 1
        self.bytes_held += size
        if page in self._warm:
            self._warm.remove(page)
            self._warm_bytes -= size
        return page

    def exchange(self, pages: Sequence[PageRef], kind: KvFormat, count: int) -> list[PageRef] | None:
        """Gives up one holder of each page for ``count`` pages of one format, which may be some of those whose last
        holder that was. None, and nothing changes, where the budget or the pool does not fit them."""
        freed = [page for page in pages if self.holders(page) == 1]
        held = self.bytes_held - sum(self.page_bytes[page.format] for page in freed) + count * self.page_bytes[kind]
        used = len(self._holders[kind]) - sum(page.format is kind for page in freed) + count
        if held > self.budget_bytes or used > self._capacities[kind]:
            return None
        for page in pages:
            self.release(page)
        return [self.allocate(kind) for _ in range(count)]

    def share(self, page: PageRef) -> PageRef:
        """Adds a holder."""
        holders = self._holders[page.format]
        if page in self._kept and holders[page.number] == 1:
            self._idle[page.format] -= 1
        holders[page.number] += 1
        return page

    def keep(self, page: PageRef) -> PageRef:
        """Adds a holder that keeps the page for reuse; a page is kept once."""
        assert page not in self._kept, f"{page} is kept already"
        self.share(page)
        self._kept.add(page)
        return page

    def drop(self, page: PageRef) -> None:
        """Takes the holder away that `keep` added."""
        self._kept.remove(page)
        if self.holders(page) == 1:
            self._idle[page.format] -= 1
        self.release(page)

    def release(self, page: PageRef) -> None:
        """Takes a holder away; with the last one the page returns to its pool."""
        holders = self._holders[page.format]
        holders[page.number] -= 1
        if holders[page.number] == 1 and page in self._kept:
            self._idle[page.format] += 1
        if holders[page.number] == 0:
            del holders[page.number]
            heapq.heappush(self._returned[page.format], page.number)
            self.bytes_held -= self.page_bytes[page.format]
            self._warm.add(page)
            self._warm_bytes += self.page_bytes[page.format]

    def cool(self, keep_bytes: int) -> list[PageRef]:
        """Free pages that were used since they were named here last, but for up to ``keep_bytes`` of those that will be
        handed out first: their memory need not be there. None before there are twice as many bytes, so that ordinary
        coming and going names none."""
        if self._warm_bytes <= 2 * keep_bytes:
            return []
        named: list[PageRef] = []
        for page in sorted(self._warm, key=lambda page: page.number, reverse=True):
            if self._warm_bytes <= keep_bytes:
                break
            named.append(page)
            self._warm.remove(page)
            self._warm_bytes -= self.page_bytes[page.format]
        return named

    def check_integrity(self, tables: Iterable[Iterable[PageRef]]) -> None:
        """Checks that ``tables`` (of live sequences, and of the prefix cache) are exactly the holders there are.

        Raises AssertionError otherwise: a leak or a page used twice is a bug of ours.
        """
        held = Counter(page for table in tables for page in table)
        known = Counter(
            {PageRef(kind, number): n for kind, pages in self._holders.items() for number, n in pages.items()}
        )
        assert not held - known, f"pages {held - known} are used by more than hold them"
        assert not known - held, f"pages {known - held} have leaked"
        assert self.bytes_held == sum(self.page_bytes[page.format] for page in known)
        assert self.bytes_held <= self.budget_bytes
        assert self._kept <= set(known)
        for kind, pages in self._holders.items():
            assert self._idle[kind] == sum(page.format is kind and known[page] == 1 for page in self._kept)
            returned = set(self._returned[kind])
            assert not set(pages) & returned
            assert set(pages) | returned == set(range(1, self._next[kind]))
        assert not self._warm & set(known)
        assert self._warm_bytes == sum(self.page_bytes[page.format] for page in self._warm)

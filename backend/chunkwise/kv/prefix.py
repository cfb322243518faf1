"""Keys and values of earlier prompts, found again by content. Pure: pages and tuples, no tensors, no clock.

A page may be reused only if everything that its content depends on is the same: all tokens up to its end, the adapter's
weights, and the gate of every one of those tokens. So the key of a page is its content and its predecessor; tokens are
compared, not hashed. Only pages of sequences that have not compressed anything yet are kept: what is computed over
8-bit pages differs from what is computed over full ones, and a request always starts over full ones.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from chunkwise.kv.pages import PageAllocator, PageRef

# Finding the oldest pages looks at all of them; freeing several at once spreads that.
_EVICTED_AT_ONCE = 16

PageKey = tuple[tuple[int, ...], Hashable]
"""Tokens of a page and the gates they were computed under."""


@dataclass(slots=True, eq=False)
class PrefixNode:
    """One kept page; ``page`` is None at a root. ``used`` is the logical time of the last use."""

    page: PageRef | None
    parent: PrefixNode | None
    key: Hashable
    used: int = 0
    children: dict[Hashable, PrefixNode] = field(default_factory=dict)


class PrefixCache:
    """A trie of pages per adapter. It is one holder of every page in it; sequences that use a page hold it as well."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self._roots: dict[Hashable, PrefixNode] = {}
        self._nodes: set[PrefixNode] = set()
        self._time = 0
        self.reused_pages = 0
        self.evicted_pages = 0

    def pages(self) -> list[PageRef]:
        """All pages kept."""
        return [node.page for node in self._nodes if node.page is not None]

    def root(self, adapter_hash: str | None) -> PrefixNode:
        """Where the prefixes of one adapter (None: the base model) start."""
        return self._roots.setdefault(adapter_hash, PrefixNode(None, None, adapter_hash))

    def match(self, adapter_hash: str | None, keys: Sequence[PageKey]) -> list[PrefixNode]:
        """The longest kept run of pages with these keys; the caller becomes a holder of each page."""
        node, found = self.root(adapter_hash), list[PrefixNode]()
        for key in keys:
            child = node.children.get(key)
            if child is None or child.page is None:
                break
            self._allocator.share(child.page)
            self._touch(child)
            found.append(child)
            node = child
        self.reused_pages += len(found)
        return found

    def insert(self, parent: PrefixNode, key: PageKey, page: PageRef) -> tuple[PrefixNode, PageRef]:
        """Keeps a page behind ``parent``. Returns its node and the page that the caller holds from now on: where a page
        with this key is kept already, that one takes the place of ``page``."""
        node = parent.children.get(key)
        if node is None:
            node = PrefixNode(self._allocator.keep(page), parent, key)
            parent.children[key] = node
            self._nodes.add(node)
        elif node.page is not None and node.page != page:
            self._allocator.release(page)
            page = self._allocator.share(node.page)
        self._touch(node)
        return node, page

    def evict(self) -> bool:
        """Frees some of the least recently used pages that nobody else holds, those first which nothing follows; what
        follows another is out of reach then. False: all pages are held."""
        idle = [node for node in self._nodes if node.page and self._allocator.holders(node.page) == 1]
        last = [node for node in idle if not node.children]
        for node in sorted(last or idle, key=lambda node: node.used)[:_EVICTED_AT_ONCE]:
            self._drop(node)
            self.evicted_pages += 1
        return bool(idle)

    def forget(self, pages: Collection[PageRef]) -> bool:
        """Lets go of these pages and of what follows them. False: none of them is kept."""
        found = [node for node in self._nodes if node.page in pages]
        for node in found:
            self._forget(node)
        return bool(found)

    def clear(self) -> None:
        """Lets go of every page; sequences keep what they hold."""
        for page in self.pages():
            self._allocator.drop(page)
        self._nodes.clear()
        self._roots.clear()

    def _forget(self, node: PrefixNode) -> None:
        for child in list(node.children.values()):
            self._forget(child)
        if node in self._nodes:
            self._drop(node)

    def _drop(self, node: PrefixNode) -> None:
        assert node.page is not None
        assert node.parent is not None
        self._allocator.drop(node.page)
        del node.parent.children[node.key]
        self._nodes.remove(node)

    def _touch(self, node: PrefixNode) -> None:
        self._time += 1
        node.used = self._time

"""The KV cache of one shard: write, gather, rewrite. Who holds which page is `pages`' business, how it lies in memory
`pools`'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkwise.core import KvFormat, KvScorer, KvUsage
from chunkwise.kv.pages import PageAllocator, PageRef
from chunkwise.kv.pools import KvShape, Pool
from chunkwise.kv.prefix import PrefixCache
from chunkwise.kv.scorers import best_tokens

__all__ = ["GatherPlan", "KvCache", "KvShape", "plan_gather"]

_POOL_SHARES = {KvFormat.FULL: 0.6, KvFormat.INT8: 0.25, KvFormat.INT4: 0.15}
# What a rewrite may hold in the model's type at a time, and free pages whose memory is kept for the next request.
_SCRATCH_BYTES = 2 << 20
_WARM_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """Where the pages of one gathered block of ``pages`` pages lie: per format that occurs, pool indices and the places
    in the block."""

    pages: int
    parts: tuple[tuple[KvFormat, Tensor, Tensor], ...]


def plan_gather(pages: Sequence[PageRef], device: torch.device) -> GatherPlan:
    """The plan that lays ``pages`` out one after another."""
    by_format: dict[KvFormat, tuple[list[int], list[int]]] = {}
    for place, page in enumerate(pages):
        indices, places = by_format.setdefault(page.format, ([], []))
        indices.append(page.number)
        places.append(place)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    parts = tuple((kind, tensor(indices), tensor(places)) for kind, (indices, places) in by_format.items())
    return GatherPlan(len(pages), parts)


def _capacities(page_bytes: dict[KvFormat, int], budget_bytes: int, device: torch.device) -> dict[KvFormat, int]:
    """Pages of each pool. On CPU each pool may take the whole budget, since untouched pages cost nothing; elsewhere a
    pool takes its memory at once, so the budget is divided."""
    shares = dict.fromkeys(KvFormat, 1.0) if device.type == "cpu" else _POOL_SHARES
    return {kind: int(budget_bytes * shares[kind]) // size for kind, size in page_bytes.items()}


class KvCache:
    """Pools of pages for all layers. Tokens are always written to full pages; `compress` and `pack` rewrite them.

    Attributes:
        rewritten_pages: pages given up for other pages or for none, since the start.
        dropped_tokens: tokens given up, since the start.
    """

    def __init__(self, shape: KvShape, dtype: torch.dtype, device: torch.device, budget_bytes: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.rewritten_pages = 0
        self.dropped_tokens = 0
        page_bytes = shape.page_bytes(dtype)
        capacities = _capacities(page_bytes, budget_bytes, device)
        self.allocator = PageAllocator(page_bytes, budget_bytes, capacities)
        self.prefix = PrefixCache(self.allocator)
        self.pools = {kind: Pool(kind, shape, dtype, device, capacities[kind] + 1) for kind in KvFormat}

    def allocate(self, kind: KvFormat) -> PageRef:
        """One page; idle pages of earlier prompts make room if they must. Raises OutOfPages."""
        while self.allocator.free(kind) < 1 and self.prefix.evict():
            pass
        return self.allocator.allocate(kind)

    def full_bytes(self, dropped_tokens: int) -> int:
        """What the pages that sequences hold, and so many dropped tokens, would take in full."""
        pages = sum(self.allocator.pages(kind) for kind in KvFormat) + dropped_tokens // self.shape.page_size
        return pages * self.allocator.page_bytes[KvFormat.FULL]

    def usage(self) -> tuple[KvUsage, ...]:
        """Per format: pages that sequences hold, their bytes, and the pages kept for reuse alone."""
        pages = self.allocator
        return tuple(
            KvUsage(kind, pages.pages(kind), pages.pages(kind) * size, pages.idle(kind))
            for kind, size in pages.page_bytes.items()
        )

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores ``keys`` and ``values`` ``[tokens, heads, head_dim]`` of one layer at ``slots`` ``[tokens]``; slot =
        page index * page size + offset, in the full pool."""
        pages, offsets = slots // self.shape.page_size, slots % self.shape.page_size
        tensors = self.pools[KvFormat.FULL].tensors
        tensors["keys"][:, layer][pages, :, offsets] = keys
        tensors["values"][:, layer][pages, :, offsets] = values

    def gather(self, layer: int, plan: GatherPlan) -> tuple[Tensor, Tensor]:
        """Keys and values of the planned pages, each ``[pages * page size, heads, head_dim]`` in the model's dtype.
        Positions beyond what was written hold finite leftovers and must be masked."""
        keys, values = self._load(plan, slice(layer, layer + 1))
        return self._by_position(keys), self._by_position(values)

    def _load(self, plan: GatherPlan, layers: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of some layers of the planned pages, each ``[pages, layers, heads, page, head_dim]``."""
        loaded = [(places, *self.pools[kind].load(indices, layers)) for kind, indices, places in plan.parts]
        if len(loaded) == 1:
            return loaded[0][1:]
        block = (plan.pages, *loaded[0][1].shape[1:])
        keys, values = (torch.empty(block, dtype=self.dtype, device=self.device) for _ in range(2))
        for places, some_keys, some_values in loaded:
            keys.index_copy_(0, places, some_keys)
            values.index_copy_(0, places, some_values)
        return keys, values

    def _by_position(self, pages: Tensor) -> Tensor:
        return pages[:, 0].transpose(1, 2).reshape(-1, self.shape.heads, self.shape.head_dim)

    def compress(self, pages: Sequence[PageRef], kind: KvFormat) -> list[PageRef]:
        """Copies pages to a smaller format and returns, in the same order, the pages that the caller holds from now on.
        A page of this format or a smaller one stays.

        A page that nobody else holds gives its bytes to the smaller copy. A shared page stays for its other holders;
        where the budget does not fit a copy of it, the caller keeps it as it is.
        """
        held: list[PageRef] = []
        for page in pages:
            copy = self._exchange([page], kind, 1) if page.format < kind else None
            held.append(copy[0] if copy else page)
        moves = [(old, new) for old, new in zip(pages, held, strict=True) if new is not old]
        at_once = max(_SCRATCH_BYTES // self.allocator.page_bytes[KvFormat.FULL], 1)
        for start in range(0, len(moves), at_once):
            old, new = zip(*moves[start : start + at_once], strict=True)
            plan, target = plan_gather(old, self.device), self._numbers(new)
            self.pools[kind].store(target, slice(None), *self._load(plan, slice(None)))
        self.rewritten_pages += len(moves)
        self._cool()
        return held

    def pack(self, pages: Sequence[PageRef], kind: KvFormat, count: int, scorer: KvScorer) -> list[PageRef] | None:
        """Gives up ``pages`` for ``count`` pages of one format that hold, per layer and head, the tokens which
        ``scorer`` ranks highest, in their order. Every page given must be full of tokens.

        Returns:
            The pages that the caller holds from now on, or None, and nothing changes, where shared pages leave no room
            for the copy.
        """
        target = self._exchange(pages, kind, count)
        if target is None:
            return None
        if count:
            self._move_best(plan_gather(pages, self.device), kind, self._numbers(target), scorer)
        self.rewritten_pages += len(pages)
        self.dropped_tokens += (len(pages) - count) * self.shape.page_size
        self._cool()
        return target

    def _move_best(self, plan: GatherPlan, kind: KvFormat, target: Tensor, scorer: KvScorer) -> None:
        """A few layers at a time: all of a layer is read before it is written, since sources and targets may be the
        same pages, and the scratch stays small."""
        shape = self.shape
        layer_bytes = self.allocator.page_bytes[KvFormat.FULL] // shape.layers
        at_once = max(_SCRATCH_BYTES // (plan.pages * layer_bytes), 1)
        for start in range(0, shape.layers, at_once):
            layers = slice(start, min(start + at_once, shape.layers))
            keys, values = (_by_head(part) for part in self._load(plan, layers))
            kept = best_tokens(keys, len(target) * shape.page_size, scorer)[..., None].expand(-1, -1, -1, keys.shape[3])
            parts = (_by_page(part.gather(2, kept), shape.page_size) for part in (keys, values))
            self.pools[kind].store(target, layers, *parts)

    def _exchange(self, pages: Sequence[PageRef], kind: KvFormat, count: int) -> list[PageRef] | None:
        """See `PageAllocator.exchange`; idle pages make room if they must, and then these very pages, where it is only
        for reuse that they are shared."""
        while (made := self.allocator.exchange(pages, kind, count)) is None:
            kept_besides = {page for page in pages if self.allocator.holders(page) == 2}
            if not self.prefix.evict() and not self.prefix.forget(kept_besides):
                return None
        return made

    def _numbers(self, pages: Sequence[PageRef]) -> Tensor:
        return torch.tensor([page.number for page in pages], dtype=torch.int64, device=self.device)

    def scrub(self, pages: Sequence[PageRef]) -> None:
        """Zeroes pages that nobody else holds: a sequence that produced NaN must not leave it behind in memory that
        another sequence's masked positions read."""
        for page in pages:
            if self.allocator.holders(page) == 1:
                self.pools[page.format].scrub(page.number)

    def release(self, pages: Sequence[PageRef]) -> None:
        """Takes a holder of each page away."""
        for page in pages:
            self.allocator.release(page)
        self._cool()

    def _cool(self) -> None:
        """Gives free pages beyond a few back to the operating system."""
        for page in self.allocator.cool(_WARM_BYTES):
            self.pools[page.format].give_back([page.number])


def _by_head(pages: Tensor) -> Tensor:
    """``[pages, layers, heads, page, dim]`` to ``[layers, heads, tokens, dim]``."""
    return pages.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _by_page(tokens: Tensor, page_size: int) -> Tensor:
    """The inverse of `_by_head`."""
    layers, heads, _, dim = tokens.shape
    return tokens.view(layers, heads, -1, page_size, dim).permute(2, 0, 1, 3, 4)

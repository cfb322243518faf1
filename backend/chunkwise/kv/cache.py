"""The tensors of the KV cache of one shard: write, gather, compress. Who holds which page is `pages`' business."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkwise.core import KvFormat, KvUsage
from chunkwise.kv.formats import dequantize_keys, dequantize_values, quantize_keys, quantize_values
from chunkwise.kv.pages import PageAllocator, PageRef
from chunkwise.kv.prefix import PrefixCache

_POOL_SHARES = {KvFormat.FULL: 0.75, KvFormat.INT8: 0.25}


@dataclass(frozen=True, slots=True)
class KvShape:
    """Dimensions of one shard's cache."""

    layers: int
    heads: int
    head_dim: int
    page_size: int

    def page_bytes(self, dtype: torch.dtype) -> dict[KvFormat, int]:
        """Bytes of one page per format over all layers, keys, values and scales together."""
        values = self.page_size * self.heads * self.head_dim
        scales = 4 * self.heads * (self.head_dim + self.page_size)
        return {
            KvFormat.FULL: self.layers * 2 * values * dtype.itemsize,
            KvFormat.INT8: self.layers * (2 * values + scales),
        }


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """Where the pages of one gathered block lie: ``full`` and ``int8`` are pool indices, the ``_to`` twins their places
    in the block of ``pages`` pages. Without int8 pages ``full`` alone, in order, is the whole block."""

    pages: int
    full: Tensor
    full_to: Tensor
    int8: Tensor
    int8_to: Tensor


def plan_gather(pages: Sequence[PageRef], device: torch.device) -> GatherPlan:
    """The plan that lays ``pages`` out one after another."""
    by_format: dict[KvFormat, tuple[list[int], list[int]]] = {kind: ([], []) for kind in KvFormat}
    for place, page in enumerate(pages):
        indices, places = by_format[page.format]
        indices.append(page.number)
        places.append(place)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    full, int8 = by_format[KvFormat.FULL], by_format[KvFormat.INT8]
    return GatherPlan(len(pages), tensor(full[0]), tensor(full[1]), tensor(int8[0]), tensor(int8[1]))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on CPU cost no resident memory until they are written, so a pool may be as large as the whole budget
    and only touched pages count; without huge pages, of which one holds many of ours."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _capacities(page_bytes: dict[KvFormat, int], budget_bytes: int, device: torch.device) -> dict[KvFormat, int]:
    """Pages of each pool. On CPU each pool may take the whole budget, since untouched pages cost nothing; elsewhere a
    pool takes its memory at once, so the budget is divided."""
    shares = {KvFormat.FULL: 1.0, KvFormat.INT8: 1.0} if device.type == "cpu" else _POOL_SHARES
    return {kind: int(budget_bytes * shares[kind]) // size for kind, size in page_bytes.items()}


class KvCache:
    """Pools of pages for all layers. Tokens are always written to full pages; `compress` moves whole pages to int8."""

    def __init__(self, shape: KvShape, dtype: torch.dtype, device: torch.device, budget_bytes: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        page_bytes = shape.page_bytes(dtype)
        capacities = _capacities(page_bytes, budget_bytes, device)
        self.allocator = PageAllocator(page_bytes, budget_bytes, capacities)
        self.prefix = PrefixCache(self.allocator)
        # One head's part of a page lies together: attention reads it as one run of memory.
        page = (shape.heads, shape.page_size, shape.head_dim)
        full, int8 = capacities[KvFormat.FULL] + 1, capacities[KvFormat.INT8] + 1
        self._keys = _zeros((shape.layers, full, *page), dtype, device)
        self._values = _zeros((shape.layers, full, *page), dtype, device)
        self._keys_q = _zeros((shape.layers, int8, *page), torch.int8, device)
        self._values_q = _zeros((shape.layers, int8, *page), torch.int8, device)
        self._key_scales = _zeros((shape.layers, int8, shape.heads, shape.head_dim), torch.float32, device)
        self._value_scales = _zeros((shape.layers, int8, shape.heads, shape.page_size), torch.float32, device)

    @property
    def addresses(self) -> dict[str, int]:
        """Where the pools begin, on CPU, and how many pages they have."""
        return {
            "page_size": self.shape.page_size,
            "full_pages": self._keys.shape[1],
            "int8_pages": self._keys_q.shape[1],
            "keys": self._keys.data_ptr(),
            "values": self._values.data_ptr(),
            "keys_q": self._keys_q.data_ptr(),
            "values_q": self._values_q.data_ptr(),
            "key_scales": self._key_scales.data_ptr(),
            "value_scales": self._value_scales.data_ptr(),
        }

    def allocate(self, kind: KvFormat) -> PageRef:
        """One page; idle pages of earlier prompts make room if they must. Raises OutOfPages."""
        self._fits(kind)
        return self.allocator.allocate(kind)

    def _fits(self, kind: KvFormat) -> bool:
        """Whether the budget fits another page, after evicting idle pages if it must."""
        while self.allocator.free(kind) < 1 and self.prefix.evict():
            pass
        return self.allocator.free(kind) > 0

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
        self._keys[layer][pages, :, offsets] = keys
        self._values[layer][pages, :, offsets] = values

    def gather(self, layer: int, plan: GatherPlan) -> tuple[Tensor, Tensor]:
        """Keys and values of the planned pages, each ``[pages * page size, heads, head_dim]`` in the model's dtype.
        Positions beyond what was written hold finite leftovers and must be masked."""
        keys = self._keys[layer].index_select(0, plan.full)
        values = self._values[layer].index_select(0, plan.full)
        if plan.int8.numel() == 0:
            return self._by_position(keys), self._by_position(values)
        block = (plan.pages, *keys.shape[1:])
        all_keys, all_values = keys.new_empty(block), keys.new_empty(block)
        all_keys.index_copy_(0, plan.full_to, keys)
        all_values.index_copy_(0, plan.full_to, values)
        keys_q, key_scales = self._keys_q[layer][plan.int8], self._key_scales[layer][plan.int8]
        values_q, value_scales = self._values_q[layer][plan.int8], self._value_scales[layer][plan.int8]
        all_keys.index_copy_(0, plan.int8_to, dequantize_keys(keys_q, key_scales, self.dtype))
        all_values.index_copy_(0, plan.int8_to, dequantize_values(values_q, value_scales, self.dtype))
        return self._by_position(all_keys), self._by_position(all_values)

    def _by_position(self, pages: Tensor) -> Tensor:
        return pages.transpose(1, 2).reshape(-1, self.shape.heads, self.shape.head_dim)

    def compress(self, pages: Sequence[PageRef]) -> list[PageRef]:
        """Copies full pages to int8 pages and returns, in the same order, the pages that the caller holds from now on.

        A page that nobody else holds gives its bytes to the smaller copy. A shared page stays for its other holders;
        where the budget does not fit a copy of it, the caller keeps it as it is.
        """
        held: list[PageRef] = []
        for page in pages:
            shared = self.allocator.holders(page) > 1
            if not shared:
                self.allocator.release(page)
            if shared and not self._fits(KvFormat.INT8):
                held.append(page)
                continue
            held.append(self.allocator.allocate(KvFormat.INT8))
            if shared:
                self.allocator.release(page)
        moves = [(old.number, new.number) for old, new in zip(pages, held, strict=True) if new is not old]
        if moves:
            source, target = torch.tensor(moves, dtype=torch.int64, device=self.device).unbind(dim=1)
            self._quantize(source, target)
        return held

    def _quantize(self, source: Tensor, target: Tensor) -> None:
        # One layer at a time: the fp32 scratch stays small however many pages are rewritten.
        for layer in range(self.shape.layers):
            self._keys_q[layer][target], self._key_scales[layer][target] = quantize_keys(self._keys[layer][source])
            self._values_q[layer][target], self._value_scales[layer][target] = quantize_values(
                self._values[layer][source]
            )

    def scrub(self, pages: Sequence[PageRef]) -> None:
        """Zeroes pages that nobody else holds: a sequence that produced NaN must not leave it behind in memory that
        another sequence's masked positions read."""
        for page in (page for page in pages if self.allocator.holders(page) == 1):
            if page.format is KvFormat.FULL:
                tensors = (self._keys, self._values)
            else:
                tensors = (self._key_scales, self._value_scales)
            for tensor in tensors:
                tensor[:, page.number].zero_()

    def release(self, pages: Sequence[PageRef]) -> None:
        """Takes a holder of each page away."""
        for page in pages:
            self.allocator.release(page)

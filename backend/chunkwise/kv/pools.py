"""The memory of the KV pages of one format. A page is one run of bytes, layer after layer, so that it can be given back
to the operating system by itself. Who holds which page is `pages`' business."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkwise.core import KvFormat
from chunkwise.kv.formats import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

_KEYS, _VALUES = -2, -1
"""The axis that the scales of keys, or of values, are shared along, in ``[..., heads, page, dim]``."""
_LINE = 64
_OS_PAGE = mmap.PAGESIZE

PARTS = ("keys", "values", "key_scales", "value_scales", "key_middles", "value_middles")


@dataclass(frozen=True, slots=True)
class KvShape:
    """Dimensions of one shard's cache."""

    layers: int
    heads: int
    head_dim: int
    page_size: int

    def parts(self, kind: KvFormat, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of everything that one layer of a page of this format consists of."""
        rows, channels, tokens = (self.heads, self.page_size), (self.heads, self.head_dim), (self.heads, self.page_size)
        if kind is KvFormat.FULL:
            stored, width, scales = dtype, self.head_dim, {}
        elif kind is KvFormat.INT8:
            stored, width = torch.int8, self.head_dim
            scales = {"key_scales": (channels, torch.float32), "value_scales": (tokens, torch.float32)}
        else:
            stored, width = torch.uint8, self.head_dim // 2
            scales = {
                "key_scales": (channels, torch.bfloat16),
                "value_scales": (tokens, torch.bfloat16),
                "key_middles": (channels, torch.bfloat16),
                "value_middles": (tokens, torch.bfloat16),
            }
        # One head's part of a page lies together: attention reads it as one run of memory.
        return {"keys": ((*rows, width), stored), "values": ((*rows, width), stored), **scales}

    def page_bytes(self, dtype: torch.dtype) -> dict[KvFormat, int]:
        """Bytes of one page per format over all layers, keys, values and scales together. In proportion to ``heads``,
        so that tensor-parallel ranks can hold the same pages."""
        return {
            kind: self.layers * sum(math.prod(part) * kept.itemsize for part, kept in self.parts(kind, dtype).values())
            for kind in KvFormat
        }


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Pool:
    """``pages`` pages of one format.

    ``tensors`` are views of all pages by part name, ``[pages, layers, *part]``. On CPU untouched pages cost no resident
    memory, and `give_back` makes a page untouched again.
    """

    def __init__(self, kind: KvFormat, shape: KvShape, dtype: torch.dtype, device: torch.device, pages: int) -> None:
        self.kind = kind
        self.pages = pages
        self._dtype = dtype
        self.offsets: dict[str, int] = {}
        parts, end = shape.parts(kind, dtype), 0
        for name, (part, stored) in parts.items():
            self.offsets[name] = end
            end += _round_up(math.prod(part) * stored.itemsize, _LINE)
        self.layer_bytes = end
        self.page_bytes = _round_up(shape.layers * end, _OS_PAGE if device.type == "cpu" else _LINE)
        self._memory = _map(pages * self.page_bytes) if device.type == "cpu" else None
        if self._memory is None:
            self._bytes = torch.zeros(pages * self.page_bytes, dtype=torch.uint8, device=device)
        else:
            self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)[: pages * self.page_bytes]
        self.tensors = {name: self._view(shape.layers, name, *part) for name, part in parts.items()}

    @property
    def address(self) -> int:
        """Where page 0 begins, on CPU."""
        return self._bytes.data_ptr()

    def _view(self, layers: int, name: str, part: tuple[int, ...], stored: torch.dtype) -> Tensor:
        size = stored.itemsize
        inner = [math.prod(part[i + 1 :]) for i in range(len(part))]
        strides = [self.page_bytes // size, self.layer_bytes // size, *inner]
        return self._bytes.view(stored).as_strided((self.pages, layers, *part), strides, self.offsets[name] // size)

    def load(self, pages: Tensor, layers: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of ``pages`` ``[n]`` in some layers, each ``[n, layers, heads, page, head_dim]`` in the
        model's type."""
        parts = {name: tensor[:, layers].index_select(0, pages) for name, tensor in self.tensors.items()}
        keys, values = parts["keys"], parts["values"]
        if self.kind is KvFormat.FULL:
            return keys, values
        key_scales, value_scales = parts["key_scales"], parts["value_scales"]
        if self.kind is KvFormat.INT8:
            return (
                dequantize_int8(keys, key_scales, _KEYS, self._dtype),
                dequantize_int8(values, value_scales, _VALUES, self._dtype),
            )
        return (
            dequantize_int4(keys, key_scales, parts["key_middles"], _KEYS, self._dtype),
            dequantize_int4(values, value_scales, parts["value_middles"], _VALUES, self._dtype),
        )

    def store(self, pages: Tensor, layers: slice, keys: Tensor, values: Tensor) -> None:
        """The inverse of `load` up to rounding."""
        if self.kind is KvFormat.FULL:
            parts = {"keys": keys, "values": values}
        elif self.kind is KvFormat.INT8:
            parts = _named(("", "_scales"), quantize_int8(keys, _KEYS), quantize_int8(values, _VALUES))
        else:
            parts = _named(("", "_scales", "_middles"), quantize_int4(keys, _KEYS), quantize_int4(values, _VALUES))
        for name, part in parts.items():
            self.tensors[name][:, layers].index_copy_(0, pages, part)

    def scrub(self, page: int) -> None:
        """Makes a page all zeros."""
        for tensor in self.tensors.values():
            tensor[page].zero_()

    def give_back(self, pages: Iterable[int]) -> None:
        """Returns the memory of pages to the operating system, on CPU; they read as zeros from then on."""
        if self._memory is not None:
            for page in pages:
                self._memory.madvise(mmap.MADV_DONTNEED, page * self.page_bytes, self.page_bytes)


def _named(names: Sequence[str], keys: Sequence[Tensor], values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Quantised keys and values as parts of a page; the numbers themselves come first."""
    keys_named = {f"key{name or 's'}": part for name, part in zip(names, keys, strict=True)}
    return keys_named | {f"value{name or 's'}": part for name, part in zip(names, values, strict=True)}


def _map(size: int) -> mmap.mmap:
    """Anonymous memory without huge pages, of which one holds many of ours."""
    memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory

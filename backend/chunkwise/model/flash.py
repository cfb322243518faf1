"""Faster attention where the device has it: which kernels serve a step, chosen by what is installed.

Decoding tokens go to `paged_decode` (Triton): it reads pages of 16 tokens and of every format in place, while
flash-attn 2 wants full pages of at least 256 tokens. Longer spans go to flash-attn over gathered pages, in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as remember
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from chunkwise.kv.cache import KvCache
from chunkwise.model.page_table import PageTable, page_table
from chunkwise.model.step import StepInput, StepSpan

_FLASH_TYPES = (torch.float16, torch.bfloat16)


class DecodeAttention(Protocol):
    """Attention of one query each of ``sequences`` sequences over their pages."""

    sequences: int

    def forward(self, layer: int, q: Tensor) -> Tensor:
        """``q`` [S, H, D] to [S, H, D]."""
        ...

    def head_spread(self, layer: int, q: Tensor) -> Tensor:
        """`attention.spread` of the first head, ``[S]``."""
        ...


@dataclass(frozen=True, slots=True)
class TabledStep(StepInput):
    """A step of one token per sequence whose pages are those of ``table``, whatever it holds when a kernel runs. It has
    no ``spans``: nothing in it is read on the host, so it can be captured."""

    table: PageTable


@remember
def installed(package: str) -> bool:
    """Whether ``package`` can be imported."""
    return find_spec(package) is not None


def choose_decode(cache: KvCache, step: StepInput, decoding: Sequence[StepSpan]) -> DecodeAttention | None:
    """Attention for the ``decoding`` spans of a step: Triton's on a CUDA device where it is installed, else None."""
    if isinstance(step, TabledStep):
        return _paged_decode(cache, step.table)
    if cache.device.type != "cuda" or not decoding or not installed("triton"):
        return None
    table = page_table([span.pages for span in decoding], [span.context for span in decoding], cache.device)
    return _paged_decode(cache, table)


def _paged_decode(cache: KvCache, table: PageTable) -> DecodeAttention:
    decode: DecodeAttention = import_module("chunkwise.model.paged_decode").PagedDecode(cache, table)
    return decode


class FlashPrefill:
    """Causal attention of several spans in one call of flash-attn's ``flash_attn_varlen_func``.

    Args:
        kernel: that function. Of a sequence's L keys and n queries, query i sees keys 0 … L - n + i, as in flash-attn
            since 2.1.
    """

    def __init__(self, kernel: Callable[..., Tensor], spans: Sequence[StepSpan], device: torch.device) -> None:
        self._kernel = kernel
        tokens, contexts = [span.tokens for span in spans], [span.context for span in spans]
        self._most = max(tokens), max(contexts)
        self._starts = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (tokens, contexts)
        ]

    def forward(self, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """``q`` [n, H, D] of all spans; per span ``keys`` and ``values`` [context, K, D]; returns [n, H, D]."""
        return self._kernel(q, torch.cat(list(keys)), torch.cat(list(values)), *self._starts, *self._most, causal=True)


def choose_prefill(cache: KvCache, spans: Sequence[StepSpan]) -> FlashPrefill | None:
    """Attention for ``spans``: flash-attn's on a CUDA device in half precision where it is installed, else None."""
    if cache.device.type != "cuda" or cache.dtype not in _FLASH_TYPES or not spans or not installed("flash_attn"):
        return None
    return FlashPrefill(import_module("flash_attn").flash_attn_varlen_func, spans, cache.device)

"""Attention over the paged cache, and the attention signal. Scores are scaled by 1/√head_dim throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkwise.core import KvFormat
from chunkwise.kv.cache import GatherPlan, KvCache, plan_gather
from chunkwise.kv.pages import PageRef
from chunkwise.model.flash import choose_decode, choose_prefill
from chunkwise.model.step import StepInput, StepSpan

_PADDING = PageRef(KvFormat.FULL, 0)


def _decode(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """``q`` [S, H, D] against ``keys``, ``values`` [S, L, K, D], ``mask`` [S, L]; returns [S, H, D].

    The query heads of one KV head take the place of query positions, so keys are not repeated.
    """
    sequences, heads, dim = q.shape
    grouped = q.view(sequences, keys.shape[2], heads // keys.shape[2], dim)
    out = F.scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask[:, None, None, :]
    )
    return out.reshape(sequences, heads, dim)


def _prefill(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``q`` [n, H, D] are the last n of the L positions in ``keys``, ``values`` [L, K, D]; causal; gives [n, H, D]."""
    n, context = q.shape[0], keys.shape[0]
    mask = None if n == context else torch.ones(n, context, dtype=torch.bool, device=q.device).tril(context - n)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def spread(q: Tensor, keys: Tensor, mask: Tensor, contexts: Tensor) -> Tensor:
    """Entropy of one head's attention weights over ln(context).

    Args:
        q: ``[S, D]`` query of the last token; keys: ``[S, L, D]``; mask: ``[S, L]``; contexts: ``[S]``.

    Returns:
        ``[S]`` in [0, 1]; 0 where the context is a single token.
    """
    scores = torch.einsum("sd,sld->sl", q.float(), keys.float()) / math.sqrt(q.shape[-1])
    log_weights = scores.masked_fill(~mask, -math.inf).log_softmax(dim=-1)
    entropy = -(log_weights.exp() * log_weights.masked_fill(~mask, 0.0)).sum(dim=-1)
    return entropy / contexts.float().log().clamp_min(math.log(2.0))


@dataclass(frozen=True, slots=True)
class _DecodeBlock:
    """One token each of several sequences, at ``rows`` of the step. ``plan`` gathers every sequence's pages, padded to
    the longest table; ``mask`` [S, padded context] is True at positions that exist; ``contexts`` [S] counts them."""

    rows: slice | Tensor
    sequences: int
    plan: GatherPlan
    mask: Tensor
    contexts: Tensor


def _decode_blocks(spans: Sequence[StepSpan], page_size: int, device: torch.device) -> list[_DecodeBlock]:
    """One block per power of two of pages: padding to the longest table of all would make every short sequence pay for
    a long one."""
    groups: dict[int, list[StepSpan]] = {}
    for span in spans:
        groups.setdefault((len(span.pages) - 1).bit_length(), []).append(span)
    return [_decode_block(group, page_size, device) for group in groups.values()]


def _decode_block(spans: list[StepSpan], page_size: int, device: torch.device) -> _DecodeBlock:
    longest = max(len(span.pages) for span in spans)
    pages = [page for span in spans for page in [*span.pages, *[_PADDING] * (longest - len(span.pages))]]
    contexts = torch.tensor([span.context for span in spans], device=device)
    mask = torch.arange(longest * page_size, device=device)[None] < contexts[:, None]
    rows = [span.first_row for span in spans]
    adjacent = rows[-1] - rows[0] + 1 == len(rows)
    where = slice(rows[0], rows[-1] + 1) if adjacent else torch.tensor(rows, device=device)
    return _DecodeBlock(where, len(rows), plan_gather(pages, device), mask, contexts)


class PagedAttention:
    """Attention of one step: writes a layer's keys and values to the cache and attends over it.

    The leading spans of one token are taken together, the others one by one (a prompt's single last token behind longer
    spans is one of those), unless the device has something faster, see `flash`.
    """

    def __init__(self, cache: KvCache, step: StepInput) -> None:
        self._cache = cache
        self._slots = step.slots
        device = step.slots.device
        decoding = list(takewhile(lambda span: span.tokens == 1, step.spans))
        longer = step.spans[len(decoding) :]
        self._paged = choose_decode(cache, step, decoding)
        self._flash = choose_prefill(cache, longer)
        self._blocks = _decode_blocks(decoding, cache.shape.page_size, device) if self._paged is None else []
        self._spans = [(span, plan_gather(span.pages, device)) for span in longer]
        self._decoding = len(decoding) if self._paged is None else self._paged.sequences

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` [T, H, D], ``k`` and ``v`` [T, K, D] of this rank; returns [T, H, D]."""
        self._cache.write(layer, self._slots, k, v)
        out = torch.empty_like(q)
        if self._paged is not None:
            out[: self._decoding] = self._paged.forward(layer, q[: self._decoding])
        for block in self._blocks:
            keys, values = self._gather_block(layer, block)
            out[block.rows] = _decode(q[block.rows], keys, values, block.mask)
        if self._flash is not None:
            gathered = [self._gather_span(layer, span, plan) for span, plan in self._spans]
            out[self._decoding :] = self._flash.forward(q[self._decoding :], *zip(*gathered, strict=True))
            return out
        for span, plan in self._spans:
            rows = slice(span.first_row, span.first_row + span.tokens)
            out[rows] = _prefill(q[rows], *self._gather_span(layer, span, plan))
        return out

    def head_spread(self, layer: int, q: Tensor) -> Tensor:
        """`spread` of this rank's first head at the last row of every span, ``[S]``."""
        parts = [torch.empty(self._decoding, device=q.device)]
        if self._paged is not None:
            parts[0] = self._paged.head_spread(layer, q[: self._decoding])
        for block in self._blocks:
            keys, _ = self._gather_block(layer, block)
            parts[0][block.rows] = spread(q[block.rows, 0], keys[:, :, 0], block.mask, block.contexts)
        for span, plan in self._spans:
            keys, _ = self._gather_span(layer, span, plan)
            last = q[span.first_row + span.tokens - 1, 0][None]
            everything = torch.ones(1, span.context, dtype=torch.bool, device=q.device)
            contexts = torch.tensor([span.context], device=q.device)
            parts.append(spread(last, keys[None, :, 0], everything, contexts))
        return torch.cat(parts)

    def _gather_span(self, layer: int, span: StepSpan, plan: GatherPlan) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.gather(layer, plan)
        return keys[: span.context], values[: span.context]

    def _gather_block(self, layer: int, block: _DecodeBlock) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.gather(layer, block.plan)
        shape = (block.sequences, -1, *keys.shape[1:])
        return keys.view(shape), values.view(shape)

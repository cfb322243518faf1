"""Attention over the paged cache, and the attention signal. Scores are scaled by 1/√head_dim throughout."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkwise.kv.cache import KvCache
from chunkwise.model.step import DecodeRows, PrefillSpan, StepInput


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


class PagedAttention:
    """Writes a layer's keys and values to the cache and attends over it, for decode rows and prefill spans alike."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache

    def forward(self, layer: int, step: StepInput, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` [T, H, D], ``k`` and ``v`` [T, K, D] of this rank; returns [T, H, D]."""
        self._cache.write(layer, step.slots, k, v)
        out = torch.empty_like(q)
        for block in step.decode:
            keys, values = self._gather_decode(layer, block)
            out[block.rows] = _decode(q[block.rows], keys, values, block.mask)
        for span in step.prefill:
            rows = slice(span.first_row, span.first_row + span.tokens)
            keys, values = self._gather_prefill(layer, span)
            out[rows] = _prefill(q[rows], keys, values)
        return out

    def head_spread(self, layer: int, step: StepInput, q: Tensor) -> Tensor:
        """`spread` of this rank's first head at the last row of every sequence, ``[S]``, decode rows first."""
        decoding = sum(block.sequences for block in step.decode)
        parts = [torch.empty(decoding, device=q.device)]
        for block in step.decode:
            keys, _ = self._gather_decode(layer, block)
            parts[0][block.rows] = spread(q[block.rows, 0], keys[:, :, 0], block.mask, block.contexts)
        for span in step.prefill:
            keys, _ = self._gather_prefill(layer, span)
            last = q[span.first_row + span.tokens - 1, 0][None]
            everything = torch.ones(1, span.context, dtype=torch.bool, device=q.device)
            contexts = torch.tensor([span.context], device=q.device)
            parts.append(spread(last, keys[None, :, 0], everything, contexts))
        return torch.cat(parts)

    def _gather_decode(self, layer: int, rows: DecodeRows) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.gather(layer, rows.plan)
        block = (rows.sequences, -1, *keys.shape[1:])
        return keys.view(block), values.view(block)

    def _gather_prefill(self, layer: int, span: PrefillSpan) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.gather(layer, span.plan)
        return keys[: span.context], values[: span.context]

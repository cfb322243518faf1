"""Attention of single tokens over pages of several formats, in Triton: the pages are read where they lie.

`attend` gives each program a share of one sequence's pages for one KV head and keeps a running softmax over it; `merge`
joins the shares by their log-sum-exp (flash decoding). Small pages are widened in registers, so no copy of the cache in
the model's type is ever made. Grids do not depend on contexts, so launches can be captured.

With TRITON_INTERPRET=1 the kernels run on CPU tensors; UPCAST then widens the operands of products, see
`chunkwise_adapters.ops.triton`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunkwise.core import KvFormat
from chunkwise.kv.cache import KvCache
from chunkwise.kv.pools import PARTS
from chunkwise.model.page_table import PageTable

_TOKENS = 32
_SPLITS = 16

_jit: Callable[[Callable[..., None]], Any] = triton.jit(do_not_specialize=["table_width"])


@_jit
def attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    keys_8: tl.tensor,
    values_8: tl.tensor,
    key_scales_8: tl.tensor,
    value_scales_8: tl.tensor,
    keys_4: tl.tensor,
    values_4: tl.tensor,
    key_scales_4: tl.tensor,
    value_scales_4: tl.tensor,
    key_middles_4: tl.tensor,
    value_middles_4: tl.tensor,
    numbers: tl.tensor,
    formats: tl.tensor,
    contexts: tl.tensor,
    partial: tl.tensor,
    statistics: tl.tensor,
    q_stride: tl.tensor,
    table_width: tl.tensor,
    scale: tl.tensor,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    FULL_STRIDE: tl.constexpr,
    BYTES_8: tl.constexpr,
    BYTES_4: tl.constexpr,
    MIXED: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One share of one sequence's softmax for the GROUP query heads of one KV head.

    Grid: sequences S, KV heads, SPLITS. ``q`` [S, ≥ heads·DIM] with ``q_stride``; the parts of pages are a layer's, see
    `kv.pools`: full ones lie FULL_STRIDE numbers apart, small ones BYTES_8 or BYTES_4; ``numbers`` and ``formats`` [S,
    table_width]; ``contexts`` [S]. With H the query heads of the grid: ``partial`` [S, H, SPLITS, DIM] gets the share's
    weighted mean of values, ``statistics`` [S, H, SPLITS, 2] the log-sum-exp of its scores and their weighted mean; an
    empty share has log-sum-exp -inf.
    """
    sequence, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + sequence).to(tl.int32)
    share = tl.cdiv(tl.cdiv(context, PAGE), SPLITS) * PAGE
    end = tl.minimum((split + 1) * share, context)
    members, dims = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    heads = kv * GROUP + members
    wanted = (members < GROUP)[:, None] & (dims < DIM)[None, :]
    query = tl.load(q + sequence.to(tl.int64) * q_stride + heads[:, None] * DIM + dims[None, :], mask=wanted, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    top = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    score_sum = tl.zeros((GROUP_BLOCK,), tl.float32)
    value_sum = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
    for start in range(split * share, end, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        live = tokens < end
        entry = sequence * table_width + tokens // PAGE
        number = tl.load(numbers + entry, mask=live, other=0).to(tl.int64)
        row = kv * PAGE + tokens % PAGE
        if MIXED:
            kind = tl.load(formats + entry, mask=live, other=0)
            full = live & (kind == 0)
        else:
            full = live
        at = number * FULL_STRIDE + row * DIM
        inside = dims < DIM
        key = tl.load(keys + at[None, :] + dims[:, None], mask=full[None, :] & inside[:, None], other=0.0)
        value = tl.load(values + at[:, None] + dims[None, :], mask=full[:, None] & inside[None, :], other=0.0)
        if MIXED:
            small = live & (kind == 1)
            key_mask, value_mask = small[None, :] & inside[:, None], small[:, None] & inside[None, :]
            at = number * BYTES_8 + row * DIM
            channel = number * (BYTES_8 // 4) + kv * DIM
            key_8 = tl.load(keys_8 + at[None, :] + dims[:, None], mask=key_mask, other=0).to(tl.float32)
            key_scale = tl.load(key_scales_8 + channel[None, :] + dims[:, None], mask=key_mask, other=0.0)
            key = tl.where(small[None, :], (key_8 * key_scale).to(key.dtype), key)
            value_8 = tl.load(values_8 + at[:, None] + dims[None, :], mask=value_mask, other=0).to(tl.float32)
            value_scale = tl.load(value_scales_8 + number * (BYTES_8 // 4) + row, mask=small, other=0.0)
            value = tl.where(small[:, None], (value_8 * value_scale[:, None]).to(value.dtype), value)

            small = live & (kind == 2)
            key_mask, value_mask = small[None, :] & inside[:, None], small[:, None] & inside[None, :]
            half: tl.constexpr = DIM // 2
            at = number * BYTES_4 + row * half
            shift = dims // half * 4
            channel = number * (BYTES_4 // 2) + kv * DIM
            key_4 = tl.load(keys_4 + at[None, :] + (dims % half)[:, None], mask=key_mask, other=0).to(tl.int32)
            key_4 = ((key_4 >> shift[:, None]) & 15).to(tl.float32) - 7.5
            key_scale = tl.load(key_scales_4 + channel[None, :] + dims[:, None], mask=key_mask, other=0.0)
            key_middle = tl.load(key_middles_4 + channel[None, :] + dims[:, None], mask=key_mask, other=0.0)
            widened = key_4 * key_scale.to(tl.float32) + key_middle.to(tl.float32)
            key = tl.where(small[None, :], widened.to(key.dtype), key)
            token = number * (BYTES_4 // 2) + row
            value_4 = tl.load(values_4 + at[:, None] + (dims % half)[None, :], mask=value_mask, other=0).to(tl.int32)
            value_4 = ((value_4 >> shift[None, :]) & 15).to(tl.float32) - 7.5
            value_scale = tl.load(value_scales_4 + token, mask=small, other=0.0).to(tl.float32)
            value_middle = tl.load(value_middles_4 + token, mask=small, other=0.0).to(tl.float32)
            widened = value_4 * value_scale[:, None] + value_middle[:, None]
            value = tl.where(small[:, None] & inside[None, :], widened.to(value.dtype), value)
        if UPCAST:
            key = key.to(tl.float32)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        masked = tl.where(live[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(masked, axis=1))
        weights = tl.exp(masked - new_top[:, None])
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(weights, axis=1)
        score_sum = score_sum * decay + tl.sum(weights * scores, axis=1)
        weights = weights.to(value.dtype)
        if UPCAST:
            weights, value = weights.to(tl.float32), value.to(tl.float32)
        value_sum = tl.dot(weights, value, value_sum * decay[:, None], input_precision="ieee")
        top = new_top
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    row = (sequence * tl.num_programs(1) * GROUP + heads) * SPLITS + split
    tl.store(partial + row[:, None] * DIM + dims[None, :], value_sum / safe[:, None], mask=wanted)
    tl.store(statistics + 2 * row, tl.where(empty, float("-inf"), top + tl.log(safe)), mask=members < GROUP)
    tl.store(statistics + 2 * row + 1, score_sum / safe, mask=members < GROUP)


@_jit
def merge(
    partial: tl.tensor,
    statistics: tl.tensor,
    out: tl.tensor,
    entropy: tl.tensor,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
) -> None:
    """Joins the shares of one query head: ``out`` [S·H, DIM] in the model's type, ``entropy`` fp32 [S·H] of its weights
    in nats, as ``log Σ exp(score) - mean score``. Grid: S·H. At least one share must hold a token."""
    row = tl.program_id(0)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIM_BLOCK)
    lse = tl.load(statistics + 2 * (row * SPLITS + splits))
    top = tl.max(lse, axis=0)
    weights = tl.exp(lse - top)
    total = tl.sum(weights, axis=0)
    weights = weights / total
    parts_at = partial + (row * SPLITS + splits)[:, None] * DIM + dims[None, :]
    parts = tl.load(parts_at, mask=(dims < DIM)[None, :], other=0.0)
    merged = tl.sum(parts * weights[:, None], axis=0)
    tl.store(out + row * DIM + dims, merged.to(out.dtype.element_ty), mask=dims < DIM)
    means = tl.load(statistics + 2 * (row * SPLITS + splits) + 1)
    tl.store(entropy + row, top + tl.log(total) - tl.sum(means * weights, axis=0))


class PagedDecode:
    """Decode attention over the pages of one cache that ``table`` names by the time of a launch."""

    def __init__(self, cache: KvCache, table: PageTable, splits: int = _SPLITS) -> None:
        self._cache = cache
        self._table = table
        self._splits = splits
        self.sequences = len(table.contexts)

    def forward(self, layer: int, q: Tensor) -> Tensor:
        """``q`` [S, H, D], one query per sequence; returns [S, H, D]. Semantics: softmax(q·K / √D) V over each
        sequence's context."""
        return self._run(layer, q, self._cache.shape.heads)[0]

    def head_spread(self, layer: int, q: Tensor) -> Tensor:
        """`attention.spread` of the first head, ``[S]``, from the same queries."""
        entropy = self._run(layer, q, 1)[1][:, 0]
        return entropy / self._table.contexts.float().log().clamp_min(math.log(2.0))

    def _run(self, layer: int, q: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Outputs [S, H, D] and entropies [S, H] of the query heads H of the first ``kv_heads``."""
        shape, table, pools = self._cache.shape, self._table, self._cache.pools
        sequences, dim = q.shape[0], shape.head_dim
        group = q.shape[1] // shape.heads
        heads = kv_heads * group
        assert q.stride(1) == dim and q.stride(2) == 1, "the heads of a query must be adjacent"
        partial = torch.empty((sequences, heads, self._splits, dim), dtype=torch.float32, device=q.device)
        statistics = torch.empty((sequences, heads, self._splits, 2), dtype=torch.float32, device=q.device)
        out = torch.empty((sequences, heads, dim), dtype=q.dtype, device=q.device)
        entropy = torch.empty((sequences, heads), dtype=torch.float32, device=q.device)
        dim_block = max(triton.next_power_of_2(dim), 16)
        attend[sequences, kv_heads, self._splits](
            q,
            *_parts(self._cache, layer),
            table.numbers,
            table.formats,
            table.contexts,
            partial,
            statistics,
            q.stride(0),
            table.numbers.shape[1],
            1.0 / math.sqrt(dim),
            KV=shape.heads,
            GROUP=group,
            DIM=dim,
            PAGE=shape.page_size,
            SPLITS=self._splits,
            FULL_STRIDE=pools[KvFormat.FULL].page_bytes // self._cache.dtype.itemsize,
            BYTES_8=pools[KvFormat.INT8].page_bytes,
            BYTES_4=pools[KvFormat.INT4].page_bytes,
            MIXED=table.mixed,
            TOKENS=_TOKENS,
            GROUP_BLOCK=max(triton.next_power_of_2(group), 16),
            DIM_BLOCK=dim_block,
            UPCAST=q.device.type == "cpu",
        )
        merge[sequences * heads,](partial, statistics, out, entropy, DIM=dim, SPLITS=self._splits, DIM_BLOCK=dim_block)
        return out, entropy


def _parts(cache: KvCache, layer: int) -> tuple[Tensor, ...]:
    """A layer's parts of full, int8 and int4 pages, each ``[pages, …]``."""
    return tuple(
        cache.pools[kind].tensors[part][:, layer]
        for kind in (KvFormat.FULL, KvFormat.INT8, KvFormat.INT4)
        for part in PARTS
        if part in cache.pools[kind].tensors
    )

"""Attention over pages where they lie equals attention over the gathered pages, in every mixture of formats."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from chunkwise.core import KvFormat
from chunkwise.kv.cache import KvCache, KvShape, plan_gather
from chunkwise.kv.pages import PageRef
from chunkwise.model.page_table import PageTable, page_table
from gpu import DEVICE, kernels

PAGE = 4
CONTEXTS = [1, 4, 19, 87]


def filled(shape: KvShape, dtype: torch.dtype, small_share: float) -> tuple[KvCache, list[list[PageRef]]]:
    """A cache, and the page tables of sequences of `CONTEXTS` tokens; that share of the complete pages is
    int8 or int4."""
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(small_share)
    cache = KvCache(shape, dtype, DEVICE, 80 * shape.page_bytes(dtype)[KvFormat.FULL])
    tables = []
    for context in CONTEXTS:
        pages = [cache.allocate(KvFormat.FULL) for _ in range(-(-context // PAGE))]
        slots = torch.tensor([p.number * PAGE + i for p in pages for i in range(PAGE)], device=DEVICE)
        size = (len(slots), shape.heads, shape.head_dim)
        for layer in range(shape.layers):
            keys, values = (torch.randn(size, generator=generator).to(DEVICE, dtype) for _ in range(2))
            cache.write(layer, slots, keys, values)
        for place in range(context // PAGE):
            if rng.random() < small_share:
                kind = rng.choice((KvFormat.INT8, KvFormat.INT4))
                pages[place : place + 1] = cache.compress([pages[place]], kind)
        tables.append(pages)
    return cache, tables


def dense(
    cache: KvCache, layer: int, tables: list[list[PageRef]], contexts: list[int], q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [S, H, D] and entropies of the first head over ln(context) [S], in fp64, from the cache's `gather`."""
    out = torch.empty(q.shape, dtype=torch.float64, device=DEVICE)
    spread = torch.zeros(len(tables), dtype=torch.float64, device=DEVICE)
    group = q.shape[1] // cache.shape.heads
    for i, (table, context) in enumerate(zip(tables, contexts, strict=True)):
        keys, values = (t[:context].double() for t in cache.gather(layer, plan_gather(table, DEVICE)))
        for head in range(q.shape[1]):
            scores = keys[:, head // group] @ q[i, head].double() / math.sqrt(q.shape[2])
            weights = scores.softmax(dim=0)
            out[i, head] = weights @ values[:, head // group]
            if head == 0 and context > 1:
                spread[i] = torch.special.entr(weights).sum() / math.log(context)
    return out, spread


def paged(cache: KvCache, tables: list[list[PageRef]], splits: int = 2) -> Any:
    module = kernels("chunkwise.model.paged_decode")
    return module.PagedDecode(cache, page_table(tables, CONTEXTS, DEVICE), splits)


@pytest.mark.parametrize("small_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("kv", "group", "dim", "splits"), [(2, 3, 8, 1), (1, 1, 64, 4), (2, 1, 20, 2)])
def test_equals_attention_over_gathered_pages(kv: int, group: int, dim: int, splits: int, small_share: float) -> None:
    shape = KvShape(layers=2, heads=kv, head_dim=dim, page_size=PAGE)
    cache, tables = filled(shape, torch.float32, small_share)
    q = torch.randn(len(tables), kv * group, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    decode = paged(cache, tables, splits)
    out, spread = dense(cache, 1, tables, CONTEXTS, q)
    torch.testing.assert_close(decode.forward(1, q).double(), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode.head_spread(1, q).double(), spread, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_stays_close(dtype: torch.dtype, most: float) -> None:
    shape = KvShape(layers=1, heads=2, head_dim=16, page_size=PAGE)
    cache, tables = filled(shape, dtype, 0.5)
    fused = torch.randn(len(tables), 9, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    q = fused[:, :6]
    got = paged(cache, tables).forward(0, q)
    expected, _ = dense(cache, 0, tables, CONTEXTS, q)
    assert got.dtype == dtype
    error = torch.linalg.vector_norm(got.double() - expected) / torch.linalg.vector_norm(expected)
    assert error < most


def test_pages_beyond_a_context_are_never_read() -> None:
    """Whatever lies behind the last token, and the page of the table's padding, is NaN."""
    shape = KvShape(layers=1, heads=1, head_dim=8, page_size=PAGE)
    cache, tables = filled(shape, torch.float32, 0.5)
    nan = torch.full((1, 1, 8), float("nan"), device=DEVICE)
    slots = [0]
    for table, context in zip(tables, CONTEXTS, strict=True):
        slots += [table[-1].number * PAGE + offset for offset in range(context % PAGE or PAGE, PAGE)]
    for slot in slots:
        cache.write(0, torch.tensor([slot], device=DEVICE), nan, nan)
    q = torch.randn(len(tables), 1, 8, device=DEVICE)
    assert paged(cache, tables).forward(0, q).isfinite().all()
    assert paged(cache, tables).head_spread(0, q).isfinite().all()


def test_a_table_serves_whatever_is_loaded_last() -> None:
    """As in a captured graph: made for more and longer sequences, loaded twice, the rest attends to page 0."""
    shape = KvShape(layers=1, heads=1, head_dim=8, page_size=PAGE)
    cache, tables = filled(shape, torch.float32, 0.5)
    module = kernels("chunkwise.model.paged_decode")
    table = PageTable(6, 64, True, DEVICE)
    decode = module.PagedDecode(cache, table, 2)
    q = torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for order in ([0, 1, 2, 3], [3, 1]):
        chosen, contexts = [tables[i] for i in order], [CONTEXTS[i] for i in order]
        table.load(chosen, contexts)
        got = decode.forward(0, q)
        expected, _ = dense(cache, 0, chosen, contexts, q[: len(order)])
        torch.testing.assert_close(got[: len(order)].double(), expected, rtol=1e-4, atol=1e-5)
        assert not got[len(order) :].any()

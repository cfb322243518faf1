"""A step attends alike whichever kernels serve its parts: Triton's for single tokens, flash-attn's for longer spans."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from chunkwise.core import KvFormat
from chunkwise.kv.cache import KvCache, KvShape
from chunkwise.model import attention, flash
from chunkwise.model.attention import PagedAttention
from chunkwise.model.page_table import page_table
from chunkwise.model.step import StepInput, StepSpan
from gpu import DEVICE, kernels

SHAPE = KvShape(layers=1, heads=2, head_dim=16, page_size=4)
# (tokens in this step, context) of every sequence; a prompt's single last token comes behind longer spans.
STEPS = {
    "decode": [(1, 5), (1, 19), (1, 1)],
    "prefill": [(7, 7), (3, 21), (1, 4)],
    "both": [(1, 9), (1, 4), (6, 6), (5, 14)],
}


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> torch.Tensor:
    """What flash-attn's documentation says of ``flash_attn_varlen_func``: q [total q, H, D], k and v [total k, K, D],
    the starts of the sequences in int32, scale 1/√D, the causal mask aligned to the bottom right."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = torch.empty_like(q)
    for i in range(len(starts) - 1):
        keys, values = (t[key_starts[i] : key_starts[i + 1]] for t in (k, v))
        n, context = starts[i + 1] - starts[i], len(keys)
        assert n <= max_seqlen_q and context <= max_seqlen_k
        for row in range(n):
            for head in range(q.shape[1]):
                seen, group = context - n + row + 1, head // (q.shape[1] // k.shape[1])
                scores = keys[:seen, group] @ q[starts[i] + row, head] / math.sqrt(q.shape[2])
                out[starts[i] + row, head] = scores.softmax(0) @ values[:seen, group]
    return out


def started(name: str, dtype: torch.dtype) -> tuple[KvCache, StepInput, Callable[..., torch.Tensor]]:
    """A cache with everything before the step, the step, and a source of queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    cache = KvCache(SHAPE, dtype, DEVICE, 80 * SHAPE.page_bytes(dtype)[KvFormat.FULL])

    def draw(n: int, heads: int) -> torch.Tensor:
        return torch.randn(n, heads, SHAPE.head_dim, generator=generator).to(DEVICE, dtype)

    spans, slots, row = [], list[int](), 0
    for tokens, context in STEPS[name]:
        pages = [cache.allocate(KvFormat.FULL) for _ in range(-(-context // SHAPE.page_size))]
        own = [pages[p // SHAPE.page_size].number * SHAPE.page_size + p % SHAPE.page_size for p in range(context)]
        before = torch.tensor(own[: context - tokens], dtype=torch.int64, device=DEVICE)
        cache.write(0, before, draw(len(before), SHAPE.heads), draw(len(before), SHAPE.heads))
        spans.append(StepSpan(row, tokens, context, pages))
        slots += own[context - tokens :]
        row += tokens
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    all_slots = torch.tensor(slots, device=DEVICE)
    return cache, StepInput(none, none, all_slots, none, none, none, tuple(spans), ()), draw


def attend(cache: KvCache, step: StepInput, qkv: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    paged = PagedAttention(cache, step)
    return paged.forward(0, *qkv), paged.head_spread(0, qkv[0])


def choose_nothing(*_: Any) -> None:
    return None


def choose_paged(cache: KvCache, step: StepInput, decoding: list[StepSpan]) -> Any:
    """As on a device with Triton."""
    if not decoding:
        return None
    table = page_table([span.pages for span in decoding], [span.context for span in decoding], DEVICE)
    return kernels("chunkwise.model.paged_decode").PagedDecode(cache, table, 2)


def choose_flash(kernel: Callable[..., torch.Tensor], cache: KvCache, spans: list[StepSpan]) -> Any:
    """As on a device with flash-attn."""
    return flash.FlashPrefill(kernel, spans, DEVICE) if spans else None


@pytest.mark.parametrize("name", list(STEPS))
def test_the_chosen_kernels_equal_the_plain_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, step, draw = started(name, torch.float32)
    qkv = draw(len(step.slots), 6), draw(len(step.slots), 2), draw(len(step.slots), 2)
    monkeypatch.setattr(attention, "choose_decode", choose_nothing)
    monkeypatch.setattr(attention, "choose_prefill", choose_nothing)
    expected = attend(cache, step, qkv)
    monkeypatch.setattr(attention, "choose_decode", choose_paged)
    monkeypatch.setattr(attention, "choose_prefill", partial(choose_flash, varlen))
    torch.testing.assert_close(attend(cache, step, qkv), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(STEPS))
def test_flash_attn_itself_equals_the_plain_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn = pytest.importorskip("flash_attn")
    cache, step, draw = started(name, torch.bfloat16)
    qkv = draw(len(step.slots), 6), draw(len(step.slots), 2), draw(len(step.slots), 2)
    monkeypatch.setattr(attention, "choose_prefill", choose_nothing)
    expected = attend(cache, step, qkv)
    monkeypatch.setattr(attention, "choose_prefill", partial(choose_flash, flash_attn.flash_attn_varlen_func))
    torch.testing.assert_close(attend(cache, step, qkv), expected, rtol=2e-2, atol=2e-2)


def test_a_device_without_them_uses_the_plain_ones() -> None:
    cache, step, _ = started("both", torch.float32)
    if DEVICE.type == "cpu":
        assert flash.choose_decode(cache, step, step.spans[:2]) is None
    assert flash.choose_prefill(cache, step.spans[2:]) is None

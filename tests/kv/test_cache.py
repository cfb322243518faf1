"""What is written comes back: exactly from full pages, within half a quantisation step from small ones."""

from __future__ import annotations

import pytest
import torch

from chunkwise.core import KvFormat, KvScorer
from chunkwise.kv.cache import KvCache, KvShape, plan_gather

SHAPE = KvShape(layers=2, heads=3, head_dim=8, page_size=4)
CPU = torch.device("cpu")


def _cache(pages: int = 6) -> KvCache:
    return KvCache(SHAPE, torch.float32, CPU, pages * SHAPE.page_bytes(torch.float32)[KvFormat.FULL])


def _fill(cache: KvCache, n_pages: int) -> tuple[list, torch.Tensor, torch.Tensor]:
    refs = [cache.allocator.allocate(KvFormat.FULL) for _ in range(n_pages)]
    generator = torch.Generator().manual_seed(1)
    size = (SHAPE.layers, n_pages * SHAPE.page_size, SHAPE.heads, SHAPE.head_dim)
    keys, values = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    slots = torch.tensor([ref.number * SHAPE.page_size + i for ref in refs for i in range(SHAPE.page_size)])
    for layer in range(SHAPE.layers):
        cache.write(layer, slots, keys[layer], values[layer])
    return refs, keys, values


def test_full_pages_are_exact_and_keep_the_order_of_the_table() -> None:
    cache = _cache()
    refs, keys, values = _fill(cache, 3)
    order = [2, 0, 1]
    plan = plan_gather([refs[i] for i in order], CPU)
    got_keys, got_values = cache.gather(1, plan)
    shape = (3, SHAPE.page_size, SHAPE.heads, SHAPE.head_dim)
    assert torch.equal(got_keys.view(shape), keys[1].view(shape)[order])
    assert torch.equal(got_values.view(shape), values[1].view(shape)[order])


SMALL = pytest.mark.parametrize("kind", [KvFormat.INT8, KvFormat.INT4])


def _steps(x: torch.Tensor, dim: int, kind: KvFormat) -> torch.Tensor:
    """The distance of two levels, for each number."""
    if kind is KvFormat.INT8:
        return (x.abs().amax(dim=dim, keepdim=True) / 127).expand_as(x)
    return ((x.amax(dim=dim, keepdim=True) - x.amin(dim=dim, keepdim=True)) / 15 * 1.02 + 1e-2).expand_as(x)


@SMALL
def test_compressed_pages_return_memory_and_stay_within_half_a_step(kind: KvFormat) -> None:
    cache = _cache()
    refs, keys, values = _fill(cache, 3)
    before = cache.allocator.bytes_held
    refs[0], refs[2] = cache.compress([refs[0], refs[2]], kind)
    cache.allocator.check_integrity([refs])
    full, small = (cache.allocator.page_bytes[k] for k in (KvFormat.FULL, kind))
    assert cache.allocator.bytes_held == before - 2 * (full - small)
    assert cache.rewritten_pages == 2
    for layer in range(SHAPE.layers):
        got_keys, got_values = cache.gather(layer, plan_gather(refs, CPU))
        per_page = keys[layer].view(3, SHAPE.page_size, SHAPE.heads, SHAPE.head_dim)
        key_step = _steps(per_page, 1, kind).reshape_as(keys[layer])
        value_step = _steps(values[layer], -1, kind)
        assert ((got_keys - keys[layer]).abs() <= key_step / 2 + 1e-6).all()
        assert ((got_values - values[layer]).abs() <= value_step / 2 + 1e-6).all()
        middle = slice(SHAPE.page_size, 2 * SHAPE.page_size)
        assert torch.equal(got_keys[middle], keys[layer][middle])
        assert not torch.equal(got_keys, keys[layer])


def test_pages_only_ever_become_smaller() -> None:
    cache = _cache()
    refs, keys, _ = _fill(cache, 2)
    refs = cache.compress(refs, KvFormat.INT8)
    assert cache.compress(refs, KvFormat.INT8) == refs
    assert cache.compress(refs, KvFormat.FULL) == refs
    refs[1:] = cache.compress(refs[1:], KvFormat.INT4)
    assert [ref.format for ref in refs] == [KvFormat.INT8, KvFormat.INT4]
    cache.allocator.check_integrity([refs])
    got = cache.gather(0, plan_gather(refs, CPU))[0]
    assert (got - keys[0]).abs().max() < 0.5


def _scores(keys: torch.Tensor, scorer: KvScorer) -> torch.Tensor:
    """``keys`` [tokens, dim]."""
    if scorer is KvScorer.KEY_NORM:
        return -keys.pow(2).sum(-1).sqrt()
    directions = keys / keys.pow(2).sum(-1, keepdim=True).sqrt()
    mean = directions.mean(0)
    return -(directions @ mean) / mean.pow(2).sum().sqrt()


@pytest.mark.parametrize("kind", list(KvFormat))
@pytest.mark.parametrize("scorer", list(KvScorer))
def test_packing_keeps_the_tokens_each_head_ranks_highest_in_their_order(kind: KvFormat, scorer: KvScorer) -> None:
    cache = _cache()
    refs, keys, values = _fill(cache, 5)
    others = [refs[0], refs[4]]
    held = cache.pack(refs[1:4], kind, 2, scorer)
    assert held is not None
    assert [ref.format for ref in held] == [kind] * 2
    cache.allocator.check_integrity([others, held])
    assert (cache.rewritten_pages, cache.dropped_tokens) == (3, SHAPE.page_size)
    run = slice(SHAPE.page_size, 4 * SHAPE.page_size)
    error = {KvFormat.FULL: 0.0, KvFormat.INT8: 0.03, KvFormat.INT4: 0.5}[kind]
    for layer in range(SHAPE.layers):
        got_keys, got_values = cache.gather(layer, plan_gather(held, CPU))
        for head in range(SHAPE.heads):
            mine = keys[layer, run, head]
            kept = _scores(mine, scorer).topk(2 * SHAPE.page_size).indices.sort().values
            assert (got_keys[:, head] - mine[kept]).abs().max() <= error
            assert (got_values[:, head] - values[layer, run, head][kept]).abs().max() <= error
    untouched = cache.gather(1, plan_gather(others, CPU))[0]
    assert torch.equal(untouched[: SHAPE.page_size], keys[1, : SHAPE.page_size])


def test_packing_pages_of_several_formats_and_packing_everything_away() -> None:
    cache = _cache()
    refs, keys, _ = _fill(cache, 4)
    refs[1:2] = cache.compress(refs[1:2], KvFormat.INT8)
    refs[2:3] = cache.compress(refs[2:3], KvFormat.INT4)
    held = cache.pack(refs[:3], KvFormat.INT4, 3, KvScorer.KEY_NORM)
    assert held is not None
    got = cache.gather(0, plan_gather(held, CPU))[0]
    assert (got - keys[0, : 3 * SHAPE.page_size]).abs().max() < 0.6
    assert cache.pack([*held, refs[3]], KvFormat.FULL, 0, KvScorer.KEY_NORM) == []
    cache.allocator.check_integrity([])
    assert cache.allocator.bytes_held == 0


def test_packing_shared_pages_leaves_them_to_their_other_holder_or_does_nothing() -> None:
    cache = _cache(pages=4)
    refs, keys, _ = _fill(cache, 2)
    others = [cache.allocator.share(ref) for ref in refs]
    held = cache.pack(refs, KvFormat.FULL, 1, KvScorer.KEY_NORM)
    assert held is not None
    cache.allocator.check_integrity([held, others])
    assert torch.equal(cache.gather(0, plan_gather(others, CPU))[0], keys[0])
    last = [cache.allocator.allocate(KvFormat.FULL)]
    refs = [cache.allocator.share(ref) for ref in others]
    assert cache.pack(refs, KvFormat.FULL, 1, KvScorer.KEY_NORM) is None
    cache.allocator.check_integrity([held, others, refs, last])


def test_scrubbed_pages_are_zero_when_they_are_used_again() -> None:
    cache = _cache(pages=1)
    (ref,) = refs = [cache.allocator.allocate(KvFormat.FULL)]
    nan = torch.full((SHAPE.page_size, SHAPE.heads, SHAPE.head_dim), float("nan"))
    for layer in range(SHAPE.layers):
        cache.write(layer, torch.arange(SHAPE.page_size) + ref.number * SHAPE.page_size, nan, nan)
    cache.scrub(refs)
    cache.release(refs)
    again = cache.allocator.allocate(KvFormat.FULL)
    assert again == ref
    keys, values = cache.gather(0, plan_gather([again], CPU))
    assert not keys.any()
    assert not values.any()


def test_compressing_a_shared_page_leaves_it_to_its_other_holder() -> None:
    cache = _cache()
    refs, keys, _ = _fill(cache, 1)
    other = cache.allocator.share(refs[0])
    (mine,) = cache.compress(refs, KvFormat.INT8)
    assert mine.format is KvFormat.INT8
    cache.allocator.check_integrity([[mine], [other]])
    assert torch.equal(cache.gather(0, plan_gather([other], CPU))[0], keys[0])


def test_a_shared_page_stays_as_it_is_where_no_copy_fits() -> None:
    cache = _cache(pages=1)
    refs, _, _ = _fill(cache, 1)
    cache.allocator.share(refs[0])
    assert cache.compress(refs, KvFormat.INT8) == refs
    cache.allocator.check_integrity([refs, refs])


def test_scrubbing_spares_a_shared_page() -> None:
    cache = _cache()
    refs, keys, _ = _fill(cache, 2)
    cache.allocator.share(refs[0])
    cache.scrub(refs)
    got = cache.gather(0, plan_gather(refs, CPU))[0]
    assert torch.equal(got[: SHAPE.page_size], keys[0][: SHAPE.page_size])
    assert not got[SHAPE.page_size :].any()


@pytest.mark.parametrize("scorer", list(KvScorer))
def test_heads_on_several_ranks_keep_what_they_keep_on_one(scorer: KvScorer) -> None:
    whole = _cache()
    refs, keys, values = _fill(whole, 4)
    one = whole.gather(1, plan_gather(whole.pack(refs, KvFormat.INT8, 3, scorer) or [], CPU))
    parts = []
    for heads in (slice(0, 2), slice(2, 3)):
        shape = KvShape(SHAPE.layers, heads.stop - heads.start, SHAPE.head_dim, SHAPE.page_size)
        rank = KvCache(shape, torch.float32, CPU, 4 * shape.page_bytes(torch.float32)[KvFormat.FULL])
        held = [rank.allocate(KvFormat.FULL) for _ in range(4)]
        slots = torch.tensor([ref.number * SHAPE.page_size + i for ref in held for i in range(SHAPE.page_size)])
        for layer in range(SHAPE.layers):
            rank.write(layer, slots, keys[layer, :, heads], values[layer, :, heads])
        parts.append(rank.gather(1, plan_gather(rank.pack(held, KvFormat.INT8, 3, scorer) or [], CPU)))
    for which in (0, 1):
        assert torch.equal(torch.cat([part[which] for part in parts], dim=1), one[which])


def test_pages_that_are_kept_for_reuse_besides_give_their_bytes_when_nothing_else_does() -> None:
    cache = _cache(pages=4)
    refs, keys, _ = _fill(cache, 4)
    node = cache.prefix.root(None)
    for i, ref in enumerate(refs[:3]):
        node, _ = cache.prefix.insert(node, ((i,), None), ref)
    held = cache.pack(refs[1:], KvFormat.FULL, 2, KvScorer.KEY_NORM)
    assert held is not None
    cache.allocator.check_integrity([refs[:1], held, cache.prefix.pages()])
    assert cache.prefix.pages() == refs[:1]
    assert torch.equal(cache.gather(0, plan_gather(refs[:1], CPU))[0], keys[0, : SHAPE.page_size])

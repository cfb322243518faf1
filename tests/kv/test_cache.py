"""What is written comes back: exactly from full pages, within half a quantisation step from int8 pages."""

import torch

from chunkwise.core import KvFormat
from chunkwise.kv.cache import KvCache, KvShape, plan_gather
from chunkwise.kv.formats import dequantize_keys, dequantize_values, quantize_keys, quantize_values

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


def test_compressed_pages_return_memory_and_stay_within_half_a_step() -> None:
    cache = _cache()
    refs, keys, values = _fill(cache, 3)
    before = cache.allocator.bytes_held
    refs[0], refs[2] = cache.compress([refs[0], refs[2]])
    cache.allocator.check_integrity([refs])
    full, int8 = (cache.allocator.page_bytes[kind] for kind in (KvFormat.FULL, KvFormat.INT8))
    assert cache.allocator.bytes_held == before - 2 * (full - int8)
    for layer in range(SHAPE.layers):
        got_keys, got_values = cache.gather(layer, plan_gather(refs, CPU))
        per_page = keys[layer].view(3, SHAPE.page_size, SHAPE.heads, SHAPE.head_dim)
        key_step = (per_page.abs().amax(dim=1, keepdim=True) / 127).expand_as(per_page).reshape_as(keys[layer])
        value_step = values[layer].abs().amax(dim=-1, keepdim=True) / 127
        assert ((got_keys - keys[layer]).abs() <= key_step / 2 + 1e-6).all()
        assert ((got_values - values[layer]).abs() <= value_step / 2 + 1e-6).all()
        middle = slice(SHAPE.page_size, 2 * SHAPE.page_size)
        assert torch.equal(got_keys[middle], keys[layer][middle])
        assert not torch.equal(got_keys, keys[layer])


def test_quantisation_keeps_zeros_and_extremes() -> None:
    x = torch.zeros(2, 4, 3, 8)
    x[0, 1, 2, 3] = 5.0
    x[1, 0, 0, 0] = -7.0
    for quantize, dequantize in ((quantize_keys, dequantize_keys), (quantize_values, dequantize_values)):
        q, scale = quantize(x)
        assert torch.allclose(dequantize(q, scale, torch.float32), x, atol=1e-6)


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
    (mine,) = cache.compress(refs)
    assert mine.format is KvFormat.INT8
    cache.allocator.check_integrity([[mine], [other]])
    assert torch.equal(cache.gather(0, plan_gather([other], CPU))[0], keys[0])


def test_a_shared_page_stays_as_it_is_where_no_copy_fits() -> None:
    cache = _cache(pages=1)
    refs, _, _ = _fill(cache, 1)
    cache.allocator.share(refs[0])
    assert cache.compress(refs) == refs
    cache.allocator.check_integrity([refs, refs])


def test_scrubbing_spares_a_shared_page() -> None:
    cache = _cache()
    refs, keys, _ = _fill(cache, 2)
    cache.allocator.share(refs[0])
    cache.scrub(refs)
    got = cache.gather(0, plan_gather(refs, CPU))[0]
    assert torch.equal(got[: SHAPE.page_size], keys[0][: SHAPE.page_size])
    assert not got[SHAPE.page_size :].any()

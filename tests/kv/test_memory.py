"""What the allocator says is free, the operating system has back."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from chunkwise.core import KvFormat, KvScorer
from chunkwise.kv.cache import KvCache, KvShape, plan_gather
from chunkwise.kv.pages import PageAllocator, PageRef
from chunkwise.kv.pools import Pool

CPU = torch.device("cpu")
STATM = Path("/proc/self/statm")
# One page has as many bytes as one of SmolLM2-135M.
SHAPE = KvShape(layers=30, heads=3, head_dim=64, page_size=16)
PAGES = 300


def _resident() -> int:
    return int(STATM.read_text().split()[1]) * 4096


def _filled(cache: KvCache, pages: int) -> list[PageRef]:
    refs = [cache.allocate(KvFormat.FULL) for _ in range(pages)]
    numbers = torch.tensor([ref.number for ref in refs])
    for part in cache.pools[KvFormat.FULL].tensors.values():
        part.index_fill_(0, numbers, 0.5)
    return refs


def _changes(how: str) -> list[tuple[int, int]]:
    """Bytes that the process grew by, and bytes that the allocator says are held more: after pages were filled; given
    back when they were rewritten; given back when they were released."""
    cache = KvCache(SHAPE, torch.float32, CPU, PAGES * SHAPE.page_bytes(torch.float32)[KvFormat.FULL])
    refs = _filled(cache, 20)
    cache.compress(refs, KvFormat.INT8)  # what torch needs at first use counts for nobody
    empty, held_before = _resident(), cache.allocator.bytes_held
    refs = _filled(cache, PAGES - 20)
    full, held_full = _resident(), cache.allocator.bytes_held
    changes = [(full - empty, held_full - held_before)]
    if how == "drop":
        runs = (refs[start : start + 40] for start in range(0, len(refs), 40))
        refs = [ref for run in runs for ref in cache.pack(run, KvFormat.FULL, 10, KvScorer.KEY_NORM) or []]
    else:
        refs = cache.compress(refs, KvFormat[how.upper()])
    changes.append((full - _resident(), held_full - cache.allocator.bytes_held))
    cache.release(refs)
    return [*changes, (full - _resident(), held_full - cache.allocator.bytes_held)]


@pytest.mark.skipif(not STATM.exists(), reason="reads /proc")
@pytest.mark.parametrize("how", ["int8", "int4", "drop"])
def test_resident_memory_follows_the_allocator(how: str) -> None:
    """In a process of its own: what other tests left on this one's heap comes and goes when it likes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        for resident, held in process.submit(_changes, how).result(timeout=300):
            assert held > 0 and abs(resident - held) < 0.1 * held


def test_a_page_that_was_given_back_reads_as_zeros_and_its_neighbours_stay() -> None:
    for kind in KvFormat:
        pool = Pool(kind, KvShape(2, 1, 8, 4), torch.float32, CPU, 5)
        for tensor in pool.tensors.values():
            tensor.fill_(1)
        pool.give_back([1, 3])
        for tensor in pool.tensors.values():
            assert [bool(page.any()) for page in tensor] == [True, False, True, False, True]
            assert (tensor[::2] == 1).all()
            tensor[1] = 1
            assert (tensor[1] == 1).all(), "and it can be used again"


def test_few_free_pages_stay_warm_and_the_first_to_be_used_again_are_kept() -> None:
    bytes_of = {KvFormat.FULL: 100, KvFormat.INT8: 30}
    allocator = PageAllocator(bytes_of, budget_bytes=10_000)
    pages = [allocator.allocate(KvFormat.FULL) for _ in range(50)]
    for page in pages[:8]:
        allocator.release(page)
    assert allocator.cool(400) == [], "800 bytes are no more than twice 400"
    for page in pages[8:20]:
        allocator.release(page)
    named = allocator.cool(400)
    assert named == [PageRef(KvFormat.FULL, number) for number in range(20, 4, -1)]
    assert allocator.cool(400) == []
    again = [allocator.allocate(KvFormat.FULL) for _ in range(6)]
    assert again == pages[:6]
    allocator.check_integrity([again, pages[20:]])
    for page in again:
        allocator.release(page)
    assert set(allocator.cool(0)) == set(again), "a page that was used again is warm again"


def test_what_was_given_back_is_served_again() -> None:
    shape = KvShape(layers=2, heads=1, head_dim=8, page_size=4)
    cache = KvCache(shape, torch.float32, CPU, 64 << 20)
    refs = _filled(cache, 64 * 1024 // 2)
    cache.release(refs)
    (ref,) = _filled(cache, 1)
    assert (cache.gather(1, plan_gather([ref], CPU))[0] == 0.5).all()

"""The prefix cache finds what was put in, by content, and its books agree with the allocator's under any operations."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chunkwise.core import KvFormat
from chunkwise.kv.pages import PageAllocator, PageRef
from chunkwise.kv.prefix import PrefixCache

BYTES = {KvFormat.FULL: 10, KvFormat.INT8: 3}


def _put(cache: PrefixCache, allocator: PageAllocator, adapter: str | None, keys: list[tuple]) -> list[PageRef]:
    """Plays a request: match, allocate the rest, insert it; returns the pages it holds."""
    nodes = cache.match(adapter, keys)
    held = [node.page for node in nodes]
    node = nodes[-1] if nodes else cache.root(adapter)
    for key in keys[len(nodes) :]:
        while allocator.free(KvFormat.FULL) < 1:
            if not cache.evict():
                return held
        node, page = cache.insert(node, key, allocator.allocate(KvFormat.FULL))
        held.append(page)
    return held


prompts = st.lists(st.tuples(st.tuples(st.integers(0, 2)), st.sampled_from(["g", "h"])), max_size=5)


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b"]), prompts, st.booleans()), max_size=40))
def test_books_agree_and_what_is_found_was_put(requests: list[tuple[str | None, list[tuple], bool]]) -> None:
    allocator = PageAllocator(BYTES, budget_bytes=120)
    cache = PrefixCache(allocator)
    contents: dict[PageRef, tuple] = {}
    live: list[list[PageRef]] = []
    for adapter, keys, finish in requests:
        held = _put(cache, allocator, adapter, keys)
        for i, page in enumerate(held):
            path = (adapter, *keys[: i + 1])
            if allocator.holders(page) > 2:
                assert contents[page] == path, "a shared page must have been computed for this very content"
            contents[page] = path
        live.append(held)
        if finish:
            for page in live.pop(0):
                allocator.release(page)
        allocator.check_integrity([*live, cache.pages()])
    for held in live:
        for page in held:
            allocator.release(page)
    assert allocator.pages(KvFormat.FULL) == 0
    while cache.evict():
        pass
    allocator.check_integrity([])
    assert allocator.bytes_held == 0


def test_least_recently_used_goes_first_and_pages_in_use_stay() -> None:
    allocator = PageAllocator(BYTES, budget_bytes=10_000)
    cache = PrefixCache(allocator)
    for name in "abc":
        for page in _put(cache, allocator, name, [((i,), None) for i in range(10)]):
            allocator.release(page)
    in_use = [node.page for node in cache.match("a", [((i,), None) for i in range(10)])]
    cache.evict()
    assert len(cache.match("a", [((i,), None) for i in range(10)])) == 10
    assert len(cache.match("b", [((i,), None) for i in range(10)])) < 10
    assert len(in_use) == 10


def test_what_is_forgotten_takes_what_follows_it_along() -> None:
    allocator = PageAllocator(BYTES, budget_bytes=10_000)
    cache = PrefixCache(allocator)
    held = _put(cache, allocator, None, [((i,), None) for i in range(4)])
    other = _put(cache, allocator, None, [((0,), None), ((9,), None)])
    assert not cache.forget([PageRef(KvFormat.FULL, 99)])
    assert cache.forget({held[2]})
    allocator.check_integrity([held, other, cache.pages()])
    assert set(cache.pages()) == {held[0], held[1], other[1]}
    assert cache.forget(set(held))
    assert cache.pages() == []
    allocator.check_integrity([held, other])


def test_a_page_gives_way_although_a_later_one_of_its_prompt_is_in_use() -> None:
    """So it is where a request has compressed the first and not yet the second: what is free is `room`, to the page."""
    allocator = PageAllocator(BYTES, budget_bytes=40)
    cache = PrefixCache(allocator)
    keys = [((0,), "g"), ((1,), "g"), ((2,), "g")]
    held = _put(cache, allocator, None, keys)
    allocator.release(held.pop(0))
    assert (allocator.free(KvFormat.FULL), allocator.room(KvFormat.FULL)) == (1, 2)
    assert cache.evict()
    assert (allocator.free(KvFormat.FULL), allocator.room(KvFormat.FULL)) == (2, 2)
    assert cache.evicted_pages == 1
    assert cache.match(None, keys) == []
    assert not cache.evict(), "the others are in use"
    allocator.check_integrity([held, cache.pages()])
    for page in held:
        allocator.release(page)
    while cache.evict():
        pass
    allocator.check_integrity([])


@given(st.lists(st.tuples(st.sampled_from([None, "a"]), prompts, st.integers(0, 9)), max_size=30))
def test_room_is_what_can_be_allocated(requests: list[tuple[str | None, list[tuple], int]]) -> None:
    allocator = PageAllocator(BYTES, budget_bytes=120)
    cache = PrefixCache(allocator)
    held: list[PageRef] = []
    for adapter, keys, released in requests:
        held += _put(cache, allocator, adapter, keys)
        for _ in range(min(released, len(held))):
            allocator.release(held.pop(released % len(held)))
    room = allocator.room(KvFormat.FULL)
    for _ in range(room):
        while allocator.free(KvFormat.FULL) < 1:
            assert cache.evict()
        held.append(allocator.allocate(KvFormat.FULL))
    assert allocator.room(KvFormat.FULL) == 0
    allocator.check_integrity([held, cache.pages()])

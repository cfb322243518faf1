"""The allocator never leaks, never hands a page out twice, and never exceeds its budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.core import KvFormat
from chunkwise.kv.pages import OutOfPages, PageAllocator, PageRef

BYTES = {KvFormat.FULL: 100, KvFormat.INT8: 30}


@given(
    st.lists(
        st.tuples(st.sampled_from(["full", "int8", "release", "compress", "share"]), st.integers(0, 50)), max_size=200
    )
)
def test_random_operations_keep_the_books(operations: list[tuple[str, int]]) -> None:
    allocator = PageAllocator(BYTES, budget_bytes=1_000)
    held: list[PageRef] = []
    for name, pick in operations:
        if name in ("full", "int8"):
            kind = KvFormat.FULL if name == "full" else KvFormat.INT8
            if allocator.free(kind) == 0:
                with pytest.raises(OutOfPages, match="max-batch-total-tokens"):
                    allocator.allocate(kind)
            else:
                held.append(allocator.allocate(kind))
        elif held:
            page = held.pop(pick % len(held))
            if name == "share":
                held.extend([page, allocator.share(page)])
            else:
                allocator.release(page)
                if name == "compress" and page.format is KvFormat.FULL and allocator.free(KvFormat.INT8):
                    held.append(allocator.allocate(KvFormat.INT8))
        allocator.check_integrity([held])
        assert PageRef(KvFormat.FULL, 0) not in held
        assert PageRef(KvFormat.INT8, 0) not in held


def test_lowest_index_is_reused_first_so_touched_memory_stays_at_the_high_water_mark() -> None:
    allocator = PageAllocator(BYTES, budget_bytes=1_000)
    pages = [allocator.allocate(KvFormat.FULL) for _ in range(5)]
    for page in (pages[3], pages[1]):
        allocator.release(page)
    assert allocator.allocate(KvFormat.FULL) == pages[1]
    assert allocator.allocate(KvFormat.FULL) == pages[3]


def test_bytes_of_a_compressed_page_become_available_again() -> None:
    allocator = PageAllocator(BYTES, budget_bytes=300)
    pages = [allocator.allocate(KvFormat.FULL) for _ in range(3)]
    assert allocator.free(KvFormat.FULL) == 0
    for page in pages[:2]:
        allocator.release(page)
        allocator.allocate(KvFormat.INT8)
    assert allocator.free(KvFormat.FULL) == 1


def test_integrity_check_sees_a_leak_and_a_double_use() -> None:
    allocator = PageAllocator(BYTES, budget_bytes=300)
    page = allocator.allocate(KvFormat.FULL)
    with pytest.raises(AssertionError, match="leaked"):
        allocator.check_integrity([[]])
    with pytest.raises(AssertionError, match="more than hold"):
        allocator.check_integrity([[page], [page]])

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.core import GenerationRequest, InvalidRequest
from chunkwise.router.backlog import Backlog, Capacity, prompt_length
from routing import request

CAPACITY = Capacity(page_size=4, prefill_tokens=16, total_tokens=64)


def filled(capacity: Capacity, *sizes: tuple[int, int]) -> Backlog:
    backlog = Backlog(capacity)
    for id, (prompt, new) in enumerate(sizes, start=1):
        backlog.push(replace(request(prompt, new), id=id))
    return backlog


def ids(batch: tuple[GenerationRequest, ...]) -> list[int]:
    return [each.id for each in batch]


def test_a_request_reserves_whole_pages_for_its_longest_answer() -> None:
    assert CAPACITY.reserved(request(5, 3)) == 8
    assert CAPACITY.reserved(request(5, 4)) == 12


def test_the_cache_bounds_a_batch_and_the_live_requests_count() -> None:
    backlog = filled(CAPACITY, (4, 20), (4, 20), (4, 20))
    live = backlog.next_batch([], 0)
    assert ids(live) == [1, 2]
    assert backlog.next_batch(live, 2) == ()
    assert ids(backlog.next_batch(live[:1], 1)) == [3]


def test_the_head_is_not_overtaken_by_a_request_that_would_fit() -> None:
    backlog = filled(CAPACITY, (4, 40), (4, 40), (1, 1))
    live = backlog.next_batch([], 0)
    assert ids(live) == [1]
    assert backlog.next_batch(live, 1) == ()
    assert len(backlog) == 2


def test_a_prompt_beyond_the_step_comes_last_and_in_part() -> None:
    backlog = filled(CAPACITY, (10, 2), (12, 2), (1, 1))
    batch = backlog.next_batch([], 0)
    assert [(each.id, each.chunk_len) for each in batch] == [(1, None), (2, 6)]
    assert backlog.next_batch(batch, 16) == ()
    assert ids(backlog.next_batch(batch, 1)) == [3]


def test_the_number_of_requests_is_bounded() -> None:
    backlog = filled(replace(CAPACITY, batch_size=2), (1, 1), (1, 1), (1, 1))
    live = backlog.next_batch([], 0)
    assert ids(live) == [1, 2]
    assert backlog.next_batch(live, 2) == ()
    assert ids(backlog.next_batch(live[:1], 1)) == [3]


def test_growth_is_what_the_next_tokens_take_in_whole_pages() -> None:
    capacity = replace(CAPACITY, growth_tokens=6)
    assert [capacity.growth(request(5, 20), generated) for generated in (0, 1, 2, 3, 18, 20)] == [1, 1, 2, 2, 1, 0]
    assert capacity.growth(request(4, 20), 0) == 2


def test_by_pages_that_are_free_a_request_needs_its_tokens_and_room_to_grow() -> None:
    """Prompts of four tokens take a page, and one more for growth; their answers of 40 tokens do not count."""
    backlog = filled(replace(CAPACITY, growth_tokens=4), (4, 40), (4, 40), (4, 40))
    assert (backlog.lacks(1), backlog.lacks(2)) == (True, False)
    assert backlog.next_batch([request(4, 40)], 1, 1) == ()
    assert ids(backlog.next_batch([request(4, 40)], 1, 5)) == [1, 2]
    assert ids(backlog.next_batch([request(4, 40)], 1, 2)) == [3]
    assert not backlog.lacks(-1), "nobody waits"


def test_who_was_pre_empted_comes_first_and_has_all_its_tokens_computed_anew() -> None:
    backlog = filled(replace(CAPACITY, growth_tokens=4), (4, 40))
    back = replace(request(6, 40), id=9, resumed_ids=tuple(range(10)))
    backlog.put_back(back)
    assert backlog.lacks(4), "sixteen tokens and four to come"
    batch = backlog.next_batch([], 2, 7)
    assert [(each.id, each.chunk_len) for each in batch] == [(9, 14)]
    assert backlog.remove(1)


def test_a_cancelled_request_leaves_the_queue() -> None:
    backlog = filled(CAPACITY, (1, 1), (1, 1))
    assert backlog.remove(1)
    assert not backlog.remove(1)
    assert ids(backlog.next_batch([], 0)) == [2]


def test_a_request_that_can_never_fit_is_refused() -> None:
    backlog = Backlog(CAPACITY)
    backlog.push(request(60, 4))
    with pytest.raises(InvalidRequest, match=r"needs 68 tokens.*holds 64.*lower max_new_tokens"):
        backlog.push(request(60, 5))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 24)), min_size=1, max_size=20),
    page_size=st.sampled_from([1, 4, 16]),
    prefill=st.integers(1, 40),
    batch_size=st.one_of(st.none(), st.integers(1, 4)),
    lifetimes=st.lists(st.integers(1, 6), min_size=20, max_size=20),
)
def test_budgets_hold_at_every_step_and_everyone_is_served_in_order(
    sizes: list[tuple[int, int]], page_size: int, prefill: int, batch_size: int | None, lifetimes: list[int]
) -> None:
    capacity = Capacity(page_size, prefill, 80, batch_size)
    backlog = filled(capacity, *sizes)
    live: list[GenerationRequest] = []
    left: dict[int, int] = {}
    pending: dict[int, int] = {}
    served: list[int] = []
    for _ in range(2000):
        if not backlog and not live:
            break
        current = sum(min(prefill, max(1, tokens)) for tokens in pending.values())
        admitted = backlog.next_batch(live, current)
        assert admitted or live, "an empty batch always takes the head"
        for each in admitted:
            computed = each.chunk_len if each.chunk_len is not None else prompt_length(each)
            assert 0 < computed <= prompt_length(each)
            assert each.chunk_len is None or each is admitted[-1]
            assert each.chunk_len is None or each.chunk_len < prompt_length(each)
            pending[each.id] = prompt_length(each) - computed
            current += computed
        assert not admitted or current <= prefill
        live = [*live, *admitted]
        served += ids(admitted)
        left |= {each.id: lifetimes[each.id - 1] for each in admitted}
        assert sum(capacity.reserved(each) for each in live) <= capacity.total_tokens
        assert batch_size is None or len(live) <= batch_size
        left = {id: steps - 1 for id, steps in left.items() if steps > 1}
        pending = {id: max(0, tokens - prefill) for id, tokens in pending.items() if id in left}
        live = [each for each in live if each.id in left]
    assert served == list(range(1, len(sizes) + 1))

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chunkwise.config.policy import KvPolicy
from chunkwise.core import Chunk, KvDecision, KvFormat
from chunkwise.steering.kv_policy import KvSchedule

POLICY = KvPolicy(easy_below=0.4, sink_tokens=4, recent_tokens=8)


def int8(start: int, end: int) -> KvDecision:
    return KvDecision(7, start, end, KvFormat.INT8)


def decided(policy: KvPolicy, *chunks: Chunk) -> list[KvDecision]:
    schedule = KvSchedule(7, policy)
    for chunk in chunks:
        schedule.close(chunk)
    return schedule.advance(10_000)


def test_only_chunks_strictly_below_the_bound_are_easy() -> None:
    assert decided(POLICY, Chunk(16, 32, 0.39), Chunk(32, 48, 0.4), Chunk(48, 64, 0.9)) == [int8(16, 32)]


def test_sinks_are_cut_off_and_a_chunk_of_sinks_alone_stays_full() -> None:
    assert decided(POLICY, Chunk(0, 4, 0.0), Chunk(4, 5, 0.0)) == [int8(4, 5)]
    assert decided(POLICY, Chunk(0, 16, 0.0)) == [int8(4, 16)]


def test_full_format_yields_nothing() -> None:
    assert decided(KvPolicy(easy_format="full"), Chunk(64, 128, 0.0)) == []


def test_a_chunk_waits_until_the_recent_window_lies_behind_it_and_is_given_once() -> None:
    schedule = KvSchedule(7, POLICY)
    schedule.close(Chunk(0, 16, 0.1))
    schedule.close(Chunk(16, 20, 0.1))
    assert schedule.advance(23) == []
    assert schedule.advance(24) == [int8(4, 16)]
    assert schedule.advance(27) == []
    assert schedule.advance(28) == [int8(16, 20)]
    assert schedule.advance(28) == []


@given(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0.0, 1.0)), max_size=10),
    st.integers(0, 30),
    st.integers(0, 30),
    st.lists(st.integers(1, 50), max_size=20),
)
def test_decisions_are_the_easy_chunks_outside_sinks_and_window(
    lengths: list[tuple[int, float]], sinks: int, recent: int, progress: list[int]
) -> None:
    schedule = KvSchedule(7, KvPolicy(easy_below=0.5, sink_tokens=sinks, recent_tokens=recent))
    easy: list[KvDecision] = []
    end = 0
    for length, complexity in lengths:
        start, end = end, end + length
        schedule.close(Chunk(start, end, complexity))
        if complexity < 0.5 and end > sinks:
            easy.append(int8(max(start, sinks), end))
    computed = end
    given_so_far: list[KvDecision] = []
    for more in progress:
        computed += more
        given_so_far += schedule.advance(computed)
        assert given_so_far == [decision for decision in easy if decision.end <= computed - recent]

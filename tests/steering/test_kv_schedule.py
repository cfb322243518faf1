from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.config.policy import KvPolicy
from chunkwise.core import Chunk, KvDecision, KvFormat
from chunkwise.steering.kv_policy import KvChoice, kv_rule, milder
from chunkwise.steering.kv_schedule import KvSchedule

POLICY = KvPolicy(kind="int8", when="always", sink_tokens=4, recent_tokens=8, block_tokens=16)


def schedule(policy: KvPolicy = POLICY, prompt: int = 40, chunks: tuple[int, ...] = (10, 20, 33, 40)) -> KvSchedule:
    """The schedule of a prompt whose chunks end at ``chunks``."""
    made = KvSchedule(7, prompt, policy, 1)
    for start, end in zip((0, *chunks), chunks, strict=False):
        made.close(Chunk(start, end, 0.5))
    return made


def spans(decisions: list[KvDecision]) -> list[tuple[int, int, int]]:
    return [(decision.start, decision.end, decision.effective) for decision in decisions]


def test_prompt_chunks_take_effect_at_block_ends_then_where_the_answer_begins_then_as_they_leave_the_window() -> None:
    """The chunk that ends at 20 has left the window at 28, the one that ends at 33 only in the answer."""
    made = schedule()
    assert spans(made.advance(40)) == [(4, 10, 32), (10, 20, 32)]
    assert made.advance(40) == []
    assert spans(made.advance(41)) == [(20, 33, 41)]
    assert made.advance(47) == []
    assert spans(made.advance(48)) == [(33, 40, 48)]
    assert made.made == [KvDecision(7, *span[:2], KvFormat.INT8, effective=span[2]) for span in spans(made.made)]


def test_a_prompt_without_a_block_end_behind_the_window_is_compressed_where_the_answer_begins() -> None:
    assert spans(schedule(replace(POLICY, block_tokens=512)).advance(40)) == [(4, 10, 40), (10, 20, 40)]


def test_a_window_of_nothing_still_waits_for_the_chunk_to_be_known() -> None:
    made = schedule(replace(POLICY, recent_tokens=0), prompt=16, chunks=(10, 16, 22))
    assert spans(made.advance(16)) == [(4, 10, 16)]
    assert spans(made.advance(30)) == [(10, 16, 17), (16, 22, 23)]


def test_sinks_are_cut_off_and_a_chunk_of_sinks_alone_is_left_alone() -> None:
    assert spans(schedule(chunks=(4, 5, 9)).advance(99)) == [(4, 5, 16), (5, 9, 32)]


def test_a_sliding_window_gives_up_chunks_that_lie_behind_it() -> None:
    policy = replace(POLICY, kind="window", window_tokens=12)
    (first, *_) = schedule(policy, prompt=20).advance(99)
    assert (first.start, first.end, first.format, first.drop_percent) == (4, 10, KvFormat.FULL, 100)
    assert first.effective == 22, "twelve positions behind its end"


def test_under_pressure_nothing_is_decided_before_memory_is_short_and_nothing_takes_effect_earlier() -> None:
    made = schedule(replace(POLICY, when="pressure"))
    assert not made.compressed
    assert made.advance(60) == []
    made.compress(61)
    assert made.compressed
    made.close(Chunk(40, 50, 0.5))
    assert spans(made.advance(61)) == [(4, 10, 61), (10, 20, 61), (20, 33, 61), (33, 40, 61), (40, 50, 61)]
    made.compress(90)
    made.close(Chunk(50, 60, 0.5))
    assert spans(made.advance(68)) == [(50, 60, 68)], "it was short before"


def test_a_policy_that_keeps_all_in_full_decides_nothing() -> None:
    assert schedule(replace(POLICY, kind="full")).advance(1000) == []


def test_who_is_compressed_from_the_start_is_so_whatever_the_policy_waits_for() -> None:
    made = KvSchedule(7, 40, replace(POLICY, when="pressure"), 1, compressed=True)
    made.close(Chunk(0, 10, 0.5))
    assert spans(made.advance(40)) == [(4, 10, 32)]


def test_a_page_that_chunks_share_becomes_the_mildest_of_what_they_choose() -> None:
    policy = replace(POLICY, kind="complexity", easy_below=0.3, hard_above=0.7, sink_tokens=8)
    made = KvSchedule(7, 100, policy, 8)
    for start, end, complexity in ((0, 20, 0.1), (20, 34, 0.5), (34, 44, 0.1), (44, 60, 0.9), (60, 80, 0.1)):
        made.close(Chunk(start, end, complexity))
    int4, int8 = KvFormat.INT4, KvFormat.INT8
    told = [(decision.start, decision.end, decision.format) for decision in made.advance(200)]
    assert told == [(8, 16, int4), (16, 32, int8), (32, 40, int8), (64, 80, int4)], "40 to 64 are in part hard"
    assert [made.effect(end, 201).format for end in (20, 34, 44, 60, 80)] == [int4, int8, int8, KvFormat.FULL, int4]
    assert made.effect(20, 32).format is KvFormat.FULL, "before it takes effect"


@given(
    chunks=st.lists(st.tuples(st.integers(1, 20), st.sampled_from([0.1, 0.5, 0.9])), max_size=12),
    sinks=st.integers(0, 30),
    page=st.sampled_from([1, 3, 8, 16]),
    drop=st.sampled_from([0, 40]),
)
def test_every_whole_page_becomes_the_mildest_of_its_tokens_choices(
    chunks: list[tuple[int, float]], sinks: int, page: int, drop: int
) -> None:
    policy = replace(
        POLICY, kind="complexity", easy_below=0.3, hard_above=0.7, sink_tokens=sinks, easy_drop_percent=drop
    )
    made, rule = KvSchedule(7, 50, policy, page), kv_rule(policy)
    tokens: list[KvChoice] = []
    for length, complexity in chunks:
        start = len(tokens)
        tokens += [rule.choose(complexity)] * length
        made.close(Chunk(start, len(tokens), complexity))
    tokens[:sinks] = [KvChoice()] * min(sinks, len(tokens))
    told: dict[int, tuple[KvFormat, int]] = {}
    for decision in made.advance(10_000):
        assert decision.start % page == decision.end % page == 0
        for start in range(decision.start, decision.end, page):
            assert start not in told
            told[start] = (decision.format, decision.drop_percent)
    for start in range(0, len(tokens) // page * page, page):
        mildest = functools.reduce(milder, tokens[start : start + page])
        assert told.pop(start, (KvFormat.FULL, 0)) == (mildest.format, mildest.drop_percent)
    assert not told


@pytest.mark.parametrize("when", ["always", "pressure"])
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    prompt=st.integers(1, 100),
    sinks=st.integers(0, 30),
    recent=st.integers(0, 30),
    block=st.integers(1, 40),
    progress=st.lists(st.integers(0, 20), max_size=20),
    since=st.integers(0, 120),
)
def test_what_takes_effect_does_not_depend_on_when_it_is_asked_for(
    when: str, lengths: list[int], prompt: int, sinks: int, recent: int, block: int, progress: list[int], since: int
) -> None:
    policy = replace(POLICY, when=when, sink_tokens=sinks, recent_tokens=recent, block_tokens=block)
    step_by_step, at_once = KvSchedule(7, prompt, policy, 1), KvSchedule(7, prompt, policy, 1)
    end, known = 0, list[Chunk]()
    for length in lengths:
        start, end = end, end + length
        known.append(Chunk(start, end, 0.5))
    for made in (step_by_step, at_once):
        if when == "pressure":
            made.compress(since)
        for chunk in known:
            made.close(chunk)
    position, given_so_far = 0, list[KvDecision]()
    for more in [*progress, 1000]:
        position += more
        due = step_by_step.advance(position)
        assert all(decision.effective <= position for decision in due)
        given_so_far += due
    assert given_so_far == at_once.advance(position)
    assert [decision.end for decision in given_so_far] == [chunk.end for chunk in known if chunk.end > sinks]
    for decision in given_so_far:
        assert decision.start >= sinks
        assert decision.effective > decision.end or decision.effective == prompt
        assert decision.effective >= decision.end + recent
        in_prompt = decision.effective < prompt and not (when == "pressure" and decision.effective == since)
        assert not in_prompt or decision.effective % block == 0

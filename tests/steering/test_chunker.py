from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chunkwise.config.policy import ChunkerPolicy
from chunkwise.steering.chunker import Chunker, plan_chunks

COMPLEXITIES = st.lists(st.floats(0.0, 1.0), max_size=80)
POLICIES = st.builds(
    lambda low, more, threshold, smoothing: ChunkerPolicy(low, low + more, threshold, smoothing),
    st.integers(1, 8),
    st.integers(0, 8),
    st.floats(0.01, 0.5),
    st.floats(1.0, 8.0),
)


def starts_by_definition(complexities: list[float], policy: ChunkerPolicy, lead: int) -> list[int]:
    starts = [0]
    recent = complexities[0] if complexities else 0.0
    for position, complexity in enumerate(complexities):
        recent += (complexity - recent) / policy.smoothing_tokens
        own = complexities[starts[-1] : position]
        length = position + lead - starts[-1]
        distance = abs(recent - float(np.mean(own))) if own else 0.0
        # The chunker adds its mean up in another order: where the two are equal, the last bit would decide.
        assume(not own or abs(distance - policy.threshold) > 1e-12)
        moved = bool(own) and distance > policy.threshold
        if length >= policy.max_length or (length >= policy.min_length and moved):
            starts.append(position + lead)
    return starts


@given(COMPLEXITIES, POLICIES, st.integers(0, 3))
def test_boundaries_follow_the_closing_rule(complexities: list[float], policy: ChunkerPolicy, lead: int) -> None:
    # A full chunk that a leading boundary comes too late for is the caller's to avoid, by `close_full`.
    policy = replace(policy, max_length=policy.max_length + lead)
    chunker = Chunker(policy)
    starts = [0]
    for complexity in complexities:
        start = chunker.push(complexity, lead)
        if start is not None:
            starts.append(start)
    assert starts == starts_by_definition(complexities, policy, lead)
    assert chunker.start == starts[-1]
    assert all(policy.min_length <= b - a <= policy.max_length for a, b in pairwise(starts))


@given(COMPLEXITIES, POLICIES)
def test_plan_tiles_the_prompt_within_the_bounds(complexities: list[float], policy: ChunkerPolicy) -> None:
    chunks = plan_chunks(complexities, policy)
    assert [position for chunk in chunks for position in range(chunk.start, chunk.end)] == list(
        range(len(complexities))
    )
    assert all(policy.min_length <= chunk.end - chunk.start <= policy.max_length for chunk in chunks[:-1])
    assert all(1 <= chunk.end - chunk.start <= policy.max_length for chunk in chunks)
    for chunk in chunks:
        assert chunk.complexity == pytest.approx(float(np.mean(complexities[chunk.start : chunk.end])))


def test_a_lasting_move_closes_a_chunk_and_a_single_token_does_not() -> None:
    policy = ChunkerPolicy(min_length=4, max_length=64, threshold=0.2, smoothing_tokens=4.0)
    (whole,) = plan_chunks([0.2] * 10 + [0.9] + [0.2] * 10, policy)
    assert (whole.start, whole.end) == (0, 21)
    calm, moved = plan_chunks([0.2] * 10 + [0.9] * 10, policy)
    assert 10 < calm.end == moved.start < 14
    unsmoothed = plan_chunks([0.2] * 10 + [0.9] * 10, replace(policy, smoothing_tokens=1.0))
    assert [(chunk.start, chunk.end) for chunk in unsmoothed] == [(0, 10), (10, 20)]


def test_an_even_text_is_cut_at_the_maximum() -> None:
    chunks = plan_chunks([0.5] * 10, ChunkerPolicy(min_length=2, max_length=4))
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(0, 4), (4, 8), (8, 10)]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40), POLICIES, st.floats(0.0, 1.0))
def test_a_retracted_complexity_leaves_no_trace_but_the_boundary(
    complexities: list[float], policy: ChunkerPolicy, retracted: float
) -> None:
    corrected, direct = Chunker(policy), Chunker(policy)
    for complexity in complexities[:-1]:
        assert corrected.push(complexity) == direct.push(complexity)
    corrected.push(retracted)
    corrected.retract()
    corrected.push(complexities[-1])
    direct.push(complexities[-1])
    assert corrected.observed == direct.observed == len(complexities)
    assert corrected.recent == direct.recent
    assert corrected.mean(0, len(complexities)) == direct.mean(0, len(complexities))


def test_close_full_opens_a_chunk_only_behind_a_full_one() -> None:
    chunker = Chunker(ChunkerPolicy(min_length=2, max_length=3))
    for _ in range(2):
        chunker.push(0.5)
    assert chunker.close_full() is None
    chunker.push(0.5)
    assert chunker.close_full() == chunker.start == 3
    assert chunker.close_full() is None

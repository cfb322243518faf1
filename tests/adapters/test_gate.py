from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkwise.core import ChunkDecision
from chunkwise_adapters.format import InvalidRung, LoraWeights
from chunkwise_adapters.gate import GateChunk, GatedSpan, LoraSegment, build_segments
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.store import AdapterStore, ResidentAdapter

CPU = torch.device("cpu")
RUNGS = (0, 2, 4, 8)
UNIFORM = RUNGS
# A module of a global ladder: rank 0 at a rung that is not 0, and equal ranks at different rungs.
UNEVEN = (0, 0, 5, 5)


@dataclass(frozen=True)
class FakeChunk:
    start: int
    rung: int | None = None
    scale: float = 1.0
    crossfade: int = 0


def bare_adapter(name: str, rungs: tuple[int, ...] = RUNGS) -> ResidentAdapter:
    zeros = (0.0,) * len(rungs)
    return ResidentAdapter(name, f"hash-of-{name}", rungs[-1], rungs, zeros, zeros, {})


ADAPTERS = [bare_adapter("a"), bare_adapter("b")]


def steady(chunk: GateChunk | None, ranks: tuple[int, ...]) -> list[float]:
    if chunk is None:
        return [1.0] * ranks[-1]
    k = ranks[-1] if chunk.rung is None else ranks[RUNGS.index(chunk.rung)]
    return [chunk.scale] * k + [0.0] * (ranks[-1] - k)


def expected_gate(chunks: Sequence[GateChunk], position: int, ranks: tuple[int, ...]) -> list[float]:
    """The definition, one token at a time and one column at a time."""
    begun = [chunk for chunk in chunks if chunk.start <= position]
    if not begun:
        return steady(None, ranks)
    chunk, gate = begun[-1], steady(begun[-1], ranks)
    j = position - chunk.start
    has_predecessor = len(begun) > 1 or chunk.start > 0
    if j >= chunk.crossfade or not has_predecessor:
        return gate
    previous = steady(begun[-2] if len(begun) > 1 else None, ranks)
    alpha = (j + 1) / (chunk.crossfade + 1)
    return [alpha * new + (1 - alpha) * old for new, old in zip(gate, previous, strict=True)]


def dense_gates(segments: Sequence[LoraSegment], n_rows: int, ranks: tuple[int, ...]) -> Tensor:
    """[n_rows, R]: the gates that segments give, written out; every row may be in one segment at most."""
    dense, seen = torch.zeros(n_rows, ranks[-1]), torch.zeros(n_rows)
    for segment in segments:
        rows = torch.arange(n_rows)[segment.rows]
        gates = segment.gate(ranks)
        dense[rows, : ranks[segment.rung]] = torch.ones(1) if gates is None else gates
        seen[rows] += 1
        assert sum(run.n_tokens for run in segment.runs) == len(rows)
    assert (seen <= 1).all()
    return dense


@st.composite
def chunk_lists(draw: st.DrawFn) -> tuple[FakeChunk, ...]:
    starts = sorted(draw(st.sets(st.integers(0, 30), max_size=5)))
    return tuple(
        FakeChunk(
            start,
            draw(st.sampled_from((None, *RUNGS))),
            draw(st.sampled_from((1.0, 1.0, 0.0, 0.5, 1.5))),
            draw(st.sampled_from((0, 0, 1, 4, 40))),
        )
        for start in starts
    )


@st.composite
def steps(draw: st.DrawFn) -> list[GatedSpan]:
    spans, row = [], 0
    for _ in range(draw(st.integers(0, 5))):
        row += draw(st.integers(0, 2))
        n_tokens = draw(st.sampled_from((1, 1, 3, 20)))
        spans.append(
            GatedSpan(row, n_tokens, draw(st.integers(0, 30)), draw(st.sampled_from(ADAPTERS)), draw(chunk_lists()))
        )
        row += n_tokens
    return draw(st.permutations(spans))


def n_rows(spans: Sequence[GatedSpan]) -> int:
    return max((span.first_row + span.n_tokens for span in spans), default=0) + 1


@given(spans=steps(), ranks=st.sampled_from([UNIFORM, UNEVEN]))
@settings(deadline=None, max_examples=300)
def test_gates_equal_the_definition(spans: list[GatedSpan], ranks: tuple[int, ...]) -> None:
    expected = torch.zeros(n_rows(spans), ranks[-1])
    for span in spans:
        for i in range(span.n_tokens):
            expected[span.first_row + i] = torch.tensor(expected_gate(span.chunks, span.position + i, ranks))
    segments = build_segments(spans, CPU)
    torch.testing.assert_close(dense_gates(segments, len(expected), ranks), expected)


@given(spans=steps())
@settings(deadline=None, max_examples=200)
def test_a_token_is_in_the_segment_of_its_adapter_and_widest_rung_and_skipped_tokens_in_none(
    spans: list[GatedSpan],
) -> None:
    owners = {span.first_row + i: (span, span.position + i) for span in spans for i in range(span.n_tokens)}
    segments = build_segments(spans, CPU)
    assert len({(segment.adapter.name, segment.rung) for segment in segments}) == len(segments)
    for segment in segments:
        for row in torch.arange(n_rows(spans))[segment.rows].tolist():
            span, position = owners.pop(row)
            needed = sum(weight != 0.0 for weight in expected_gate(span.chunks, position, UNIFORM))
            assert segment.adapter is span.adapter
            assert RUNGS[segment.rung] == needed > 0
    for span, position in owners.values():
        assert not any(expected_gate(span.chunks, position, UNIFORM))


@given(chunks=chunk_lists(), cuts=st.sets(st.integers(1, 39)))
@settings(deadline=None)
def test_chunked_prefill_gives_the_gates_of_the_whole_prefill(chunks: tuple[FakeChunk, ...], cuts: set[int]) -> None:
    bounds = [0, *sorted(cuts), 40]
    pieces = [GatedSpan(start, stop - start, start, ADAPTERS[0], chunks) for start, stop in pairwise(bounds)]
    whole = [GatedSpan(0, 40, 0, ADAPTERS[0], chunks)]
    gates = [dense_gates(build_segments(spans, CPU), 40, UNEVEN) for spans in (pieces, whole)]
    assert torch.equal(*gates)


def test_without_chunks_the_gate_is_full_rank_and_needs_no_multiplication() -> None:
    (segment,) = build_segments([GatedSpan(3, 5, 7, ADAPTERS[0], ())], CPU)
    assert (segment.rows, segment.rung, segment.gate(UNIFORM)) == (slice(3, 8), 3, None)


def test_a_chunk_of_scale_one_needs_no_multiplication_either() -> None:
    (segment,) = build_segments([GatedSpan(0, 5, 0, ADAPTERS[0], (FakeChunk(0, 2),))], CPU)
    assert (segment.rung, segment.gate(UNIFORM)) == (1, None)


def test_a_crossfade_between_rungs_that_a_module_cannot_tell_apart_needs_no_multiplication() -> None:
    chunks = (FakeChunk(0, 4), FakeChunk(8, 8, crossfade=3))
    (segment,) = build_segments([GatedSpan(0, 3, 8, ADAPTERS[0], chunks)], CPU)
    assert segment.gate(UNEVEN) is None
    assert segment.gate(UNIFORM) is not None


def test_modules_of_equal_ranks_share_one_gate() -> None:
    (segment,) = build_segments([GatedSpan(0, 3, 0, ADAPTERS[0], (FakeChunk(0, 4, scale=0.5),))], CPU)
    assert segment.gate(tuple(RUNGS)) is segment.gate((0, 2, 4, 8))


def test_rows_of_one_adapter_that_join_are_a_slice_and_others_indices() -> None:
    a, b = ADAPTERS
    joined = [GatedSpan(0, 2, 5, a, ()), GatedSpan(2, 1, 9, a, ()), GatedSpan(3, 1, 9, b, ())]
    assert [segment.rows for segment in build_segments(joined, CPU)] == [slice(0, 3), slice(3, 4)]
    apart = [GatedSpan(0, 1, 5, a, ()), GatedSpan(1, 1, 9, b, ()), GatedSpan(2, 2, 9, a, ())]
    rows = build_segments(apart, CPU)[0].rows
    assert isinstance(rows, Tensor) and rows.tolist() == [0, 2, 3]


def test_the_first_tokens_of_a_sequence_are_not_crossfaded() -> None:
    (segment,) = build_segments([GatedSpan(0, 4, 0, ADAPTERS[0], (FakeChunk(0, 2, crossfade=4),))], CPU)
    assert (segment.rung, segment.gate(UNIFORM)) == (1, None)


def test_a_crossfade_whose_new_weight_happens_to_be_one_still_multiplies() -> None:
    chunks = (FakeChunk(0, 4), FakeChunk(8, 8, scale=2.0, crossfade=1))
    segments = build_segments([GatedSpan(0, 1, 8, ADAPTERS[0], chunks)], CPU)
    assert dense_gates(segments, 1, UNIFORM).tolist() == [[1.5] * 4 + [1.0] * 4]


def test_an_unknown_rung_is_refused() -> None:
    with pytest.raises(InvalidRung, match="no rung 3"):
        build_segments([GatedSpan(0, 1, 0, ADAPTERS[0], (FakeChunk(0, 3),))], CPU)


def test_the_decisions_of_the_steering_protocol_are_gate_chunks() -> None:
    chunks: tuple[GateChunk, ...] = (ChunkDecision(9, 0, rung=4), ChunkDecision(9, 2, rung=8, scale=2.0, crossfade=1))
    segments = build_segments([GatedSpan(0, 4, 0, ADAPTERS[0], chunks)], CPU)
    assert dense_gates(segments, 4, UNIFORM)[:, [0, 4]].tolist() == [[1, 0], [1, 0], [1.5, 1], [2, 2]]


def test_crossfade_is_the_linear_mixture_of_the_two_rungs_outputs(make_weights: Callable[..., LoraWeights]) -> None:
    adapter = AdapterStore(None, torch.float64, CPU).add(build_ladder(make_weights(rank=8), RUNGS))
    module = adapter.modules[0, "q_proj"]
    chunks = (FakeChunk(0, 2, scale=0.8), FakeChunk(10, 8, scale=1.2, crossfade=3))
    x = torch.randn(3, 48, dtype=torch.float64)
    old, new = (scale * (x @ module.a[:k].T @ module.b_t[:k]) for k, scale in ((2, 0.8), (8, 1.2)))
    (segment,) = build_segments([GatedSpan(0, 3, 10, adapter, chunks)], CPU)
    gates = segment.gate(module.active_ranks)
    assert gates is not None
    for j in range(3):
        alpha = (j + 1) / 4
        gated = module.b_t.T @ (gates[j].double() * (module.a @ x[j]))
        torch.testing.assert_close(gated, alpha * new[j] + (1 - alpha) * old[j], rtol=0, atol=1e-5)

from __future__ import annotations

import random

import pytest

from chunkwise.config.policy import ChunkerPolicy, EstimatorPolicy, KvPolicy, RankPolicy, SignalPolicy, SteeringPolicy
from chunkwise.core import AdapterInfo, KvFormat, SequenceSignals, SteeringViolation
from chunkwise.steering.chunker import plan_chunks
from chunkwise.steering.estimator import ComplexityEstimator, Observation
from chunkwise.steering.ranks import RankSelector
from chunkwise.steering.sequence import SteeredSequence
from chunkwise.steering.signals import NgramNovelty, positional_prior

ADAPTER = AdapterInfo("a", "h", 32, (2, 4, 8, 16, 32), (0.2, 0.4, 0.6, 0.8, 1.0), (2.0, 3.0, 7.0, 15.0, 32.0))
OFF = SignalPolicy(weight=0.0, mean=0.0, std=1.0)
ENTROPY_ONLY = EstimatorPolicy(
    entropy=SignalPolicy(weight=1.0, mean=0.5, std=0.1), novelty=OFF, attention=OFF, position=OFF, inertia=1000.0
)


def sequence(policy: SteeringPolicy, prompt: list[int], adapter: AdapterInfo | None = ADAPTER) -> SteeredSequence:
    """A sequence whose ranks follow complexity."""
    return SteeredSequence(1, prompt, policy, RankSelector(policy.rank, adapter) if adapter else None)


def step(steered: SteeredSequence, position: int, prompt_length: int, entropy: float) -> int | None:
    """One decode step at ``position``, its token given first; the start of the chunk it opened."""
    if position >= prompt_length:
        steered.extend(position)
    decision = steered.observe(SequenceSignals(1, position, entropy))
    return decision.start if decision is not None else None


def test_prompt_is_planned_from_novelty_and_prior_with_each_chunks_own_mean() -> None:
    policy = SteeringPolicy(chunker=ChunkerPolicy(min_length=4, max_length=9, threshold=0.1, smoothing_tokens=2.0))
    draw = random.Random(3)
    prompt = [draw.randrange(12) for _ in range(70)]
    novelty, estimator = NgramNovelty(policy.estimator.ngram), ComplexityEstimator(policy.estimator)
    complexities = [
        estimator.estimate(
            Observation(
                novelty=novelty.push(token_id), position=positional_prior(position, len(prompt), policy.estimator)
            )
        )
        for position, token_id in enumerate(prompt)
    ]
    chunks = plan_chunks(complexities, policy.chunker)
    steered = sequence(policy, prompt)
    selector = RankSelector(policy.rank, ADAPTER)
    assert [decision.start for decision in steered.decisions()][: len(chunks)] == [chunk.start for chunk in chunks]
    for chunk, decision, reported in zip(chunks, steered.decisions(), steered.report(70).chunks, strict=False):
        assert decision.rung == reported.rung == selector.select(chunk.complexity).rung
        assert (reported.start, reported.end, reported.complexity) == (chunk.start, chunk.end, chunk.complexity)


@pytest.mark.parametrize(
    ("prompt_length", "planned", "decoded"),
    [(1, [0], 4), (3, [0], 4), (4, [0, 4], 8), (5, [0, 4], 8), (7, [0, 4], 8), (8, [0, 4, 8], 12)],
)
def test_no_chunk_outgrows_the_maximum_where_the_answer_begins(
    prompt_length: int, planned: list[int], decoded: int
) -> None:
    policy = SteeringPolicy(chunker=ChunkerPolicy(min_length=4, max_length=4))
    steered = sequence(policy, list(range(prompt_length)))
    assert [decision.start for decision in steered.decisions()] == planned
    opened = [step(steered, position, prompt_length, 0.5) for position in range(prompt_length - 1, decoded + 6)]
    assert [start for start in opened if start is not None] == [decoded, decoded + 4]


def test_chunks_of_one_token_are_steered_each_on_its_own() -> None:
    policy = SteeringPolicy(chunker=ChunkerPolicy(min_length=1, max_length=1))
    steered = sequence(policy, [5, 6])
    assert [decision.start for decision in steered.decisions()] == [0, 1, 2]
    assert [step(steered, position, 2, 0.5) for position in range(1, 6)] == [3, 4, 5, 6, 7]


def test_a_jump_of_entropy_opens_a_chunk_two_positions_later_at_the_recent_complexity() -> None:
    policy = SteeringPolicy(
        estimator=ENTROPY_ONLY, chunker=ChunkerPolicy(min_length=4, max_length=64, threshold=0.2, smoothing_tokens=1.0)
    )
    steered = sequence(policy, [0] * 4)
    assert [step(steered, position, 4, 0.5) for position in range(3, 20)] == [None] * 17
    assert step(steered, 20, 4, 0.9) == 22
    calm, hard = steered.report(24).chunks
    assert (calm.start, calm.end, hard.start, hard.end) == (0, 22, 22, 24)
    assert (calm.rung, hard.rung) == (8, 32)


def test_crossfade_blends_changes_of_gate_only_and_fits_into_the_shortest_chunk() -> None:
    policy = SteeringPolicy(
        estimator=ENTROPY_ONLY,
        chunker=ChunkerPolicy(min_length=3, max_length=3, smoothing_tokens=1.0),
        rank=RankPolicy(crossfade=8),
    )
    steered = sequence(policy, [0])
    for position in range(12):
        step(steered, position, 1, 0.5 if position < 6 else 0.9)
    chunks = steered.report(12).chunks
    assert [chunk.rung for chunk in chunks] == [8, 8, 8, 32]
    assert [chunk.crossfade for chunk in chunks] == [0, 0, 0, 3]
    assert [decision.crossfade for decision in steered.decisions()][:4] == [0, 0, 0, 3]


def test_how_a_prompt_is_cut_into_steps_changes_nothing() -> None:
    policy = SteeringPolicy(estimator=EstimatorPolicy(inertia=1.0))
    whole, pieces = sequence(policy, list(range(40))), sequence(policy, list(range(40)))
    planned = pieces.decisions()
    for position in (9, 19, 29):
        assert pieces.observe(SequenceSignals(1, position, 0.9)) is None
    assert pieces.decisions() == planned
    for steered in (whole, pieces):
        steered.observe(SequenceSignals(1, 39, 0.5))
    assert pieces.report(40) == whole.report(40)
    assert pieces.due_kv() == whole.due_kv()


def test_without_an_adapter_chunks_steer_the_kv_cache_alone() -> None:
    policy = SteeringPolicy(
        estimator=ENTROPY_ONLY,
        chunker=ChunkerPolicy(min_length=4, max_length=4),
        kv=KvPolicy(kind="int8", when="always", sink_tokens=2, recent_tokens=4),
    )
    steered = sequence(policy, [0] * 4, adapter=None)
    assert steered.decisions() == []
    due: list[tuple[int, int]] = []
    for position in range(3, 18):
        assert step(steered, position, 4, 0.5) is None
        due += [(decision.start, decision.end) for decision in steered.due_kv()]
    assert due == [(2, 4), (4, 8), (8, 12)]
    report = steered.report(16)
    assert [chunk.kv for chunk in report.chunks] == [KvFormat.INT8] * 2 + [KvFormat.FULL] * 2, "the third at 16"
    assert [chunk.kv for chunk in steered.report(17).chunks] == [KvFormat.INT8] * 3 + [KvFormat.FULL] * 2
    assert {(chunk.rung, chunk.rank, chunk.scale) for chunk in report.chunks} == {(None, 0.0, 1.0)}
    assert report.mean_rank == 0.0


def test_kv_format_waits_for_the_chunks_last_token() -> None:
    policy = SteeringPolicy(
        estimator=ENTROPY_ONLY,
        chunker=ChunkerPolicy(min_length=4, max_length=4),
        kv=KvPolicy(when="always", easy_below=0.4, hard_above=0.4, sink_tokens=0, recent_tokens=0),
    )
    steered = sequence(policy, [0])
    for position, entropy in enumerate([0.45, 0.45, 0.45]):
        step(steered, position, 1, entropy)
        assert steered.due_kv() == []
    step(steered, 3, 1, 0.9)
    assert steered.due_kv() == []
    assert steered.report(4).chunks[0].complexity > 0.4 > steered.report(3).chunks[0].complexity


def test_report_is_cut_to_the_length_and_weighs_ranks_by_tokens() -> None:
    policy = SteeringPolicy(
        estimator=ENTROPY_ONLY, chunker=ChunkerPolicy(min_length=4, max_length=4, smoothing_tokens=1.0)
    )
    steered = sequence(policy, [0])
    for position in range(8):
        step(steered, position, 1, 0.5 if position < 2 else 0.9)
    report = steered.report(6)
    assert [(chunk.start, chunk.end, chunk.rank) for chunk in report.chunks] == [(0, 4, 7.0), (4, 6, 32.0)]
    assert report.mean_rank == pytest.approx((4 * 7.0 + 2 * 32.0) / 6)
    assert steered.report(0).chunks == ()
    assert steered.report(0).mean_rank == 0.0


def test_computed_tokens_are_known_from_signals_or_from_generated_tokens() -> None:
    steered = sequence(SteeringPolicy(), [1, 2, 3])
    assert steered.computed == 0
    steered.observe(SequenceSignals(1, 1, 0.5))
    assert steered.computed == 2
    steered.extend(9)
    assert steered.computed == 3
    steered.extend(9)
    assert steered.computed == 4


@pytest.mark.parametrize("positions", [(1, 1), (2, 1), (5,), (3, 3), (3, 5)])
def test_positions_out_of_order_are_a_violation(positions: tuple[int, ...]) -> None:
    steered = sequence(SteeringPolicy(), [1, 2, 3, 4])
    for token_id in range(4):
        steered.extend(token_id)
    for position in positions[:-1]:
        steered.observe(SequenceSignals(1, position, 0.5))
    with pytest.raises(SteeringViolation, match=f"position {positions[-1]}"):
        steered.observe(SequenceSignals(1, positions[-1], 0.5))


def test_signals_of_a_token_that_was_never_given_are_a_violation() -> None:
    steered = sequence(SteeringPolicy(), [1, 2])
    steered.observe(SequenceSignals(1, 1, 0.5))
    with pytest.raises(SteeringViolation, match="before its token"):
        steered.observe(SequenceSignals(1, 2, 0.5))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        sequence(SteeringPolicy(), [])

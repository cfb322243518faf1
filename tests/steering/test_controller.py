from __future__ import annotations

import sys
from dataclasses import replace
from types import FrameType

import pytest

from chunkwise.config.policy import ChunkerPolicy, KvPolicy, RankPolicy, SteeringPolicy
from chunkwise.core import AdapterInfo, KvFormat, SequenceSignals, SteeringUpdate, SteeringViolation, StepSignals
from chunkwise.steering import SteeringController

ADAPTER = AdapterInfo("a", "h", 16, (4, 16), (0.5, 1.0), (4.0, 16.0))
POLICY = SteeringPolicy(
    chunker=ChunkerPolicy(min_length=4, max_length=4),
    rank=RankPolicy(source="complexity"),
    kv=KvPolicy(kind="int8", when="always", sink_tokens=0, recent_tokens=0),
)
UNDER_PRESSURE = replace(POLICY, kv=replace(POLICY.kv, when="pressure"))


def signals(step: int, *positions: tuple[int, int]) -> StepSignals:
    return StepSignals(step, tuple(SequenceSignals(request_id, position, 0.2) for request_id, position in positions))


def flushed(controller: SteeringController) -> SteeringUpdate:
    update = controller.flush()
    assert update is not None
    return update


def test_an_admission_is_one_update_and_nothing_new_is_none() -> None:
    controller = SteeringController(POLICY)
    assert controller.flush() is None
    assert controller.last_seq == 0
    controller.admit(5, range(8), ADAPTER)
    update = flushed(controller)
    assert [(decision.request_id, decision.start) for decision in update.chunks] == [(5, 0), (5, 4), (5, 8)]
    assert [(decision.end, decision.effective) for decision in update.kv] == [(4, 8)]
    assert (update.seq, update.released) == (1, ())
    assert controller.flush() is None
    assert controller.last_seq == 1


def test_requests_share_an_update_and_keep_their_ids() -> None:
    controller = SteeringController(POLICY)
    controller.admit(1, [7] * 8, ADAPTER)
    controller.admit(2, [7] * 7, None)
    update = flushed(controller)
    assert {decision.request_id for decision in update.chunks} == {1}
    assert [(decision.request_id, decision.end) for decision in update.kv] == [(1, 4), (2, 4)]
    for request_id in (1, 2):
        controller.extend(request_id, 9)
    controller.observe(signals(0, (1, 7), (2, 6)))
    assert controller.flush() is None, "what is due must not depend on signals that came early"
    for request_id in (1, 2):
        controller.extend(request_id, 9)
    assert [(decision.request_id, decision.end) for decision in flushed(controller).kv] == [(1, 8)]
    controller.observe(signals(1, (2, 7)))
    controller.extend(2, 9)
    assert [(decision.request_id, decision.end) for decision in flushed(controller).kv] == [(2, 8)]


def test_when_memory_is_short_requests_are_compressed_one_after_another_the_oldest_first() -> None:
    controller = SteeringController(UNDER_PRESSURE)
    for request_id in (1, 2):
        controller.admit(request_id, [7] * 9, None)
    assert controller.flush() is None
    controller.extend(1, 9)
    controller.extend(1, 9)
    assert controller.compress_next()
    compressed = [(decision.request_id, decision.end, decision.effective) for decision in flushed(controller).kv]
    assert compressed == [(1, 4, 10), (1, 8, 10)]
    assert controller.compress_next()
    assert not controller.compress_next()
    compressed = [(decision.request_id, decision.end, decision.effective) for decision in flushed(controller).kv]
    assert compressed == [(2, 4, 9), (2, 8, 9)], "it still reads its prompt: from the answer on"


def test_who_is_admitted_beside_compressed_requests_is_compressed_from_the_start() -> None:
    controller = SteeringController(UNDER_PRESSURE)
    controller.admit(1, [7] * 9, None)
    controller.compress_next()
    controller.admit(2, [7] * 9, None)
    assert [(decision.request_id, decision.effective) for decision in flushed(controller).kv] == [(1, 9)] * 2 + [
        (2, 9)
    ] * 2
    controller.release(1)
    controller.release(2)
    controller.admit(3, [7] * 9, None)
    assert flushed(controller).kv == ()


def test_a_policy_that_keeps_all_in_full_cannot_compress() -> None:
    controller = SteeringController(replace(POLICY, kv=KvPolicy(kind="full")))
    controller.admit(1, [7] * 9, None)
    assert not controller.compress_next()


def test_release_drops_what_was_not_sent_reports_and_is_sent_once() -> None:
    controller = SteeringController(POLICY)
    controller.admit(1, [7] * 8, ADAPTER)
    controller.admit(2, [7] * 8, ADAPTER)
    controller.observe(signals(0, (1, 7), (2, 7)))
    for request_id in (1, 2, 1, 2):
        controller.extend(request_id, 9)
    report = controller.release(1)
    assert report is not None
    assert [(chunk.start, chunk.end, chunk.kv) for chunk in report.chunks][:2] == [
        (0, 4, KvFormat.FULL),
        (4, 8, KvFormat.FULL),
    ]
    update = flushed(controller)
    assert {decision.request_id for decision in update.chunks} == {decision.request_id for decision in update.kv} == {2}
    assert update.released == (1,)
    assert controller.release(1) is None
    assert controller.flush() is None


def test_a_pre_empted_request_is_released_and_all_its_decisions_are_sent_again_when_it_comes_back() -> None:
    controller = SteeringController(POLICY)
    for request_id in (1, 2):
        controller.admit(request_id, [7] * 8, ADAPTER)
    first = flushed(controller)
    chunks = [decision for decision in first.chunks if decision.request_id == 1]
    kv = [decision for decision in first.kv if decision.request_id == 1]
    for position in range(7, 13):
        controller.observe(signals(position, (1, position), (2, position)))
        for request_id in (1, 2):
            controller.extend(request_id, 9)
        if position < 12:
            update = controller.flush()
            chunks += [decision for decision in update.chunks if decision.request_id == 1] if update else []
            kv += [decision for decision in update.kv if decision.request_id == 1] if update else []
    controller.pause(1)
    update = flushed(controller)
    assert update.released == (1,)
    assert {decision.request_id for decision in (*update.chunks, *update.kv)} <= {2}
    controller.resume(1)
    update = flushed(controller)
    replayed = [decision for decision in update.chunks if decision.request_id == 1]
    assert replayed[: len(chunks)] == chunks
    assert [decision.start for decision in replayed] == [0, 4, 8, 12]
    assert [decision for decision in update.kv if decision.request_id == 1][: len(kv)] == kv
    controller.observe(signals(13, (1, 5), (2, 13)))
    controller.observe(signals(14, (1, 13)))
    with pytest.raises(SteeringViolation, match="position 13 after 14"):
        controller.observe(signals(15, (1, 13)))
    controller.pause(1)
    controller.release(1)
    assert 1 in flushed(controller).released


def test_signals_that_come_while_a_request_is_pre_empted_count_and_lost_ones_are_done_without() -> None:
    whole, paused = SteeringController(POLICY), SteeringController(POLICY)
    for controller in (whole, paused):
        controller.admit(1, [7] * 6, ADAPTER)
        controller.extend(1, 9)
        controller.extend(1, 9)
    whole.observe(signals(0, (1, 5)))
    whole.observe(signals(1, (1, 6)))
    paused.pause(1)
    flushed(paused)
    paused.observe(signals(0, (1, 5)))
    paused.resume(1)
    assert [decision.start for decision in flushed(paused).chunks] == [
        decision.start for decision in flushed(whole).chunks
    ]
    for controller in (whole, paused):
        controller.observe(signals(2, (1, 7)))
        controller.extend(1, 9)
        controller.observe(signals(3, (1, 8)))


def test_report_of_a_live_request_is_that_of_its_release() -> None:
    controller = SteeringController(POLICY)
    controller.admit(1, [7] * 10, ADAPTER)
    controller.extend(1, 9)
    report = controller.report(1, 10)
    assert [chunk.end for chunk in report.chunks] == [4, 8, 10]
    assert controller.release(1) == report


def test_trailing_signals_are_ignored_and_other_uses_of_an_unknown_id_are_refused() -> None:
    controller = SteeringController(POLICY)
    controller.admit(1, [7], ADAPTER)
    controller.release(1)
    flushed(controller)
    controller.observe(signals(0, (1, 0), (99, 5)))
    assert controller.flush() is None
    for request_id in (1, 99):
        with pytest.raises(ValueError, match=f"request {request_id} is not steered"):
            controller.extend(request_id, 3)
        with pytest.raises(ValueError, match=f"request {request_id} is not steered"):
            controller.report(request_id, 1)


def test_a_live_id_and_an_empty_prompt_are_refused_without_a_trace() -> None:
    controller = SteeringController(POLICY)
    controller.admit(1, [7], ADAPTER)
    flushed(controller)
    with pytest.raises(ValueError, match="already steered"):
        controller.admit(1, [7], ADAPTER)
    with pytest.raises(ValueError, match="empty prompt"):
        controller.admit(2, [], ADAPTER)
    assert controller.flush() is None
    assert controller.release(2) is None


def test_a_position_out_of_order_names_the_request() -> None:
    controller = SteeringController(POLICY)
    controller.admit(3, [7, 7], ADAPTER)
    with pytest.raises(SteeringViolation, match="request 3"):
        controller.observe(signals(0, (3, 5)))


def test_a_token_costs_the_same_late_in_a_sequence_as_early() -> None:
    controller = SteeringController(SteeringPolicy())
    controller.admit(1, [7] * 4, ADAPTER)
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def decode(positions: range) -> float:
        nonlocal calls
        calls = 0
        sys.setprofile(count)
        try:
            for position in positions:
                if position >= 4:
                    controller.extend(1, position * position % 61)
                controller.observe(signals(position, (1, position)))
                controller.flush()
        finally:
            sys.setprofile(None)
        return calls / len(positions)

    early = decode(range(3, 500))
    decode(range(500, 4000))
    assert decode(range(4000, 4500)) < 1.2 * early

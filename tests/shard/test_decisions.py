"""A steering update that arrives early or late changes nothing: only the step's barrier decides what is effective."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.core import ChunkDecision, GenerationFailed, KvDecision, KvFormat, SteeringUpdate, SteeringViolation
from chunkwise.shard.decisions import DecisionTable


def _updates(n: int) -> list[SteeringUpdate]:
    return [
        SteeringUpdate(
            seq,
            chunks=(ChunkDecision(seq % 3, 10 * seq, rung=seq),),
            kv=(KvDecision(seq % 3, 0, seq, KvFormat.INT8),),
            released=(seq - 1,) if seq % 5 == 0 else (),
        )
        for seq in range(1, n + 1)
    ]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.data())
def test_state_depends_on_the_barriers_alone(steps: list[int], data: st.DataObject) -> None:
    """Two shards get the same barriers; one receives everything up front, the other each update at a random moment
    before it is needed. After every barrier they hold the same decisions."""
    barriers = sorted(steps)
    early, late = DecisionTable(), DecisionTable()
    early_session, late_session = early.start_session(), late.start_session()
    updates = _updates(12)
    for update in updates:
        early.receive(early_session, update)
    sent = 0
    for barrier in barriers:
        upto = data.draw(st.integers(max(barrier, sent), 12))
        for update in updates[sent:upto]:
            late.receive(late_session, update)
        sent = upto
        early.apply(barrier)
        late.apply(barrier)
        for request_id in range(3):
            chunks = list(early.take_chunks(request_id))
            assert chunks == list(late.take_chunks(request_id))
            assert all(chunk.rung is not None and chunk.rung <= barrier for chunk in chunks)
            assert list(early.take_kv(request_id)) == list(late.take_kv(request_id))
        assert len(early) == len(late)


def test_apply_waits_for_an_update_under_way() -> None:
    table = DecisionTable(timeout_seconds=5.0)
    update = SteeringUpdate(1, chunks=(ChunkDecision(1, 0, rung=2),))
    timer = threading.Timer(0.05, table.receive, [table.start_session(), update])
    timer.start()
    table.apply(1)
    assert tuple(table.take_chunks(1)) == update.chunks
    timer.join()


def test_apply_gives_up_with_a_remedy() -> None:
    start = time.monotonic()
    with pytest.raises(GenerationFailed, match="Steer stream"):
        DecisionTable(timeout_seconds=0.05).apply(1)
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize("seq", [0, 2, 7])
def test_a_gap_or_repetition_is_refused(seq: int) -> None:
    with pytest.raises(SteeringViolation, match="without gaps"):
        table = DecisionTable()
        table.receive(table.start_session(), SteeringUpdate(seq))


def test_release_and_a_new_session_forget() -> None:
    table = DecisionTable()
    session = table.start_session()
    table.receive(session, SteeringUpdate(1, chunks=(ChunkDecision(1, 0), ChunkDecision(2, 0))))
    table.receive(session, SteeringUpdate(2, released=(1,)))
    table.apply(2)
    assert not table.take_chunks(1)
    assert len(table) == 1
    table.receive(table.start_session(), SteeringUpdate(1))
    assert len(table) == 0
    table.apply(1)
    with pytest.raises(SteeringViolation, match="another Steer stream"):
        table.receive(session, SteeringUpdate(3))

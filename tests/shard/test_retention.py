"""Which pages a KV decision rewrites, and when: page boundaries, joined ranges, order, what is refused."""

from __future__ import annotations

import pytest

from chunkwise.core import KvDecision, KvFormat, SteeringViolation
from chunkwise.shard.retention import Retention, kept_pages

SIZE = 16
INT8, INT4, FULL = KvFormat.INT8, KvFormat.INT4, KvFormat.FULL


def _decision(start: int, end: int, format: KvFormat = INT8, drop: int = 0, effective: int = 0) -> KvDecision:
    return KvDecision(1, start, end, format, drop, effective=effective)


def _apply(retention: Retention, decision: KvDecision, pages: int, computed: int = 1000) -> list[int]:
    retention.accept(decision, computed)
    (due,) = retention.take_due(computed)
    return list(range(pages)[retention.grant(due, pages, SIZE).whole])


def test_pages_left_are_rounded_up() -> None:
    assert [kept_pages(5, percent) for percent in (0, 1, 20, 21, 50, 99, 100)] == [5, 5, 4, 4, 3, 1, 0]
    assert kept_pages(0, 50) == 0


def test_a_page_is_rewritten_once_all_its_positions_are_decided_alike() -> None:
    retention = Retention()
    assert _apply(retention, _decision(10, 70), 20) == [1, 2, 3]
    assert _apply(retention, _decision(70, 75), 20) == []
    assert _apply(retention, _decision(75, 96), 20) == [4, 5]
    assert _apply(retention, _decision(96, 130, INT4), 20) == [6, 7]
    assert _apply(retention, _decision(130, 160), 20) == [9], "page 8 lies in ranges that ask for different things"


def test_a_page_of_several_ranges_takes_the_largest_format_they_agree_on() -> None:
    retention = Retention()
    seen = []
    for decision in (
        _decision(0, 40, INT4),
        _decision(40, 70, INT8),
        _decision(70, 100, FULL, 50),
        _decision(60, 75, INT4),
    ):
        retention.accept(decision, 1000)
        (due,) = retention.take_due(1000)
        seen.append(retention.grant(due, 20, SIZE).shared)
    assert seen == [{2: FULL}, {2: INT8, 4: FULL}, {4: FULL, 6: FULL}, {3: INT8, 4: FULL}]
    retention.accept(_decision(75, 80, INT8), 1000)
    (due,) = retention.take_due(1000)
    assert retention.grant(due, 20, SIZE).shared == {4: INT8}


def test_neighbours_that_take_effect_together_are_one_range() -> None:
    retention = Retention()
    parts = [
        _decision(16, 40, INT8, 50),
        _decision(40, 90, INT8, 50),
        _decision(90, 96, INT8),
        _decision(96, 128, INT8),
    ]
    for decision in parts:
        retention.accept(decision, 200)
    due = retention.take_due(200)
    assert [(decision.start, decision.end) for decision in due] == [(16, 90), (90, 128)]
    assert [retention.grant(decision, 20, SIZE).whole for decision in due] == [slice(1, 5), slice(6, 8)]


def test_ranges_join_whichever_comes_first() -> None:
    retention = Retention()
    assert _apply(retention, _decision(40, 100), 20) == [3, 4, 5]
    assert _apply(retention, _decision(0, 40), 20) == [0, 1, 2]
    assert _apply(retention, _decision(150, 200), 20) == [10, 11]
    assert _apply(retention, _decision(100, 150), 20) == [6, 7, 8, 9]


def test_a_joined_range_does_not_drop_twice() -> None:
    retention = Retention()
    places = _apply(retention, _decision(16, 90, INT8, 50), 20)
    assert places == [1, 2, 3, 4]
    retention.drop(slice(1, 5), 2, SIZE)
    assert _apply(retention, _decision(90, 128, INT8, 50), 18) == [3, 4, 5], "positions 80 to 127 follow the two kept"


def test_what_is_left_of_a_run_counts_as_the_whole_run() -> None:
    retention = Retention()
    _apply(retention, _decision(16, 80, FULL, 50), 20)
    retention.drop(slice(1, 5), 2, SIZE)
    assert retention.dropped == 32
    assert _apply(retention, _decision(0, 64, INT4), 18) == [0], "half a run is no run"
    assert _apply(retention, _decision(64, 96, INT4, 10), 18) == [3], "position 80 follows the two pages kept"
    assert _apply(retention, _decision(0, 96, INT4, 100), 18) == [0, 1, 2, 3]
    retention.drop(slice(0, 4), 0, SIZE)
    assert retention.dropped == 96
    assert _apply(retention, _decision(96, 128), 14) == [0, 1]


def test_decisions_wait_for_their_position() -> None:
    retention = Retention()
    late, early, now = _decision(40, 64, INT4, effective=200), _decision(64, 80, effective=100), _decision(0, 32)
    for decision in (late, early, now):
        retention.accept(decision, 50)
    assert retention.next_effective(50) == 100
    assert retention.take_due(50) == [now]
    assert retention.take_due(99) == []
    assert retention.take_due(100) == [early]
    assert retention.next_effective(100) == 200
    assert retention.take_due(200) == [late]
    assert retention.next_effective(200) is None


def test_decisions_of_one_position_keep_their_order() -> None:
    retention = Retention()
    decisions = [_decision(96, 128, effective=128), _decision(0, 64, effective=128), _decision(0, 64, INT4)]
    for decision in decisions:
        retention.accept(decision, 128)
    assert retention.take_due(128) == decisions


def test_a_decision_that_asks_for_nothing_is_no_decision() -> None:
    retention = Retention()
    retention.accept(_decision(50, 20, FULL), 10)
    assert retention.take_due(10) == []


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (_decision(0, 16, effective=40), "takes effect at position 40, but 50 positions"),
        (_decision(0, 60), "must not be empty and end there or before"),
        (_decision(0, 81, effective=80), "must not be empty"),
        (_decision(30, 30), "must not be empty"),
        (_decision(0, 16, drop=101), "drops 101 %"),
        (_decision(20, 40), "without overlap or ask for more"),
        (_decision(20, 40, FULL, 10), "without overlap or ask for more"),
    ],
)
def test_what_is_refused(decision: KvDecision, message: str) -> None:
    retention = Retention()
    retention.accept(_decision(32, 48, INT8, 10), 50)
    with pytest.raises(SteeringViolation, match=message):
        retention.accept(decision, 50)


@pytest.mark.parametrize(
    "stronger", [_decision(32, 48, INT4), _decision(0, 50, FULL, 11), _decision(40, 50, INT8, 100)]
)
def test_more_may_be_asked_of_the_same_positions(stronger: KvDecision) -> None:
    retention = Retention()
    retention.accept(_decision(32, 48, INT8, 10), 50)
    retention.accept(stronger, 50)
    assert len(retention.take_due(50)) == 2

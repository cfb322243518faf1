"""Tokens that are looked up by their ids: on a sequence alone, and in an engine against decisions that say the same."""

from __future__ import annotations

import pytest

from chunkwise.core import ChunkDecision, RungTable, SteeringUpdate, SteeringViolation
from chunkwise.shard.decisions import DecisionTable
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld
from serving import Driver, request

TEXT = "It was a bright cold day in April."


def steered(tiny: TinyWorld, *updates: SteeringUpdate) -> list[int]:
    """The answer to the text under these updates."""
    driver = Driver(tiny.model, tiny.adapters)
    for update in updates:
        driver.steer(update)
    return driver.run(request(1, TEXT, new=40, adapter_id="a16"), seq=len(updates))[1]


def test_a_table_answers_as_decisions_for_every_token_would(tiny: TinyWorld) -> None:
    start = len(TEXT) - 1
    table = RungTable(3, {token_id: rung for token_id in range(256) for rung in (0, 16) if token_id % 3 == (rung > 0)})
    looked_up = steered(
        tiny, SteeringUpdate(1, (ChunkDecision(1, 0, 4), ChunkDecision(1, start, 1, table=3)), tables=(table,))
    )
    prompt = Tokenizer(tiny.model).encode(TEXT)
    fed = [*prompt, *looked_up][start:-1]
    rungs = [table.rungs.get(token_id, 1) for token_id in fed]
    assert len(set(rungs)) == 3
    told = tuple(ChunkDecision(1, start + i, rung) for i, rung in enumerate(rungs))
    assert steered(tiny, SteeringUpdate(1, (ChunkDecision(1, 0, 4), *told))) == looked_up
    assert steered(tiny, SteeringUpdate(1, (ChunkDecision(1, 0, 4), ChunkDecision(1, start, 1)))) != looked_up


def test_a_table_lasts_and_may_come_before_the_chunk_that_names_it(tiny: TinyWorld) -> None:
    table, chunk = RungTable(1, dict.fromkeys(range(0, 256, 2), 16)), ChunkDecision(1, 0, 0, table=1)
    together = steered(tiny, SteeringUpdate(1, (chunk,), tables=(table,)))
    assert steered(tiny, SteeringUpdate(1, tables=(table,)), SteeringUpdate(2, (chunk,))) == together


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ((ChunkDecision(1, 0, 1, table=2),), "rung table 2, which was not sent"),
        ((ChunkDecision(1, 0, 1, table=1), ChunkDecision(1, 9, 1)), "behind one with a rung table"),
        ((ChunkDecision(1, 0, 1, table=5),), "no rung 3"),
    ],
)
def test_what_a_table_cannot_do_ends_the_request(
    tiny: TinyWorld, chunks: tuple[ChunkDecision, ...], message: str
) -> None:
    driver = Driver(tiny.model, tiny.adapters)
    driver.steer(SteeringUpdate(1, chunks, tables=(RungTable(1, {5: 2}), RungTable(5, {5: 3}))))
    driver.run(request(1, TEXT, new=4, adapter_id="a16"), seq=1)
    assert message in driver.errors[1]


def test_a_new_session_forgets_tables() -> None:
    decisions = DecisionTable()
    session = decisions.start_session()
    decisions.receive(session, SteeringUpdate(1, tables=(RungTable(1, {5: 2}),)))
    with pytest.raises(SteeringViolation, match="not sent"):
        decisions.table(1)
    decisions.apply(1)
    assert decisions.table(1).rungs == {5: 2}
    decisions.start_session()
    with pytest.raises(SteeringViolation, match="not sent"):
        decisions.table(1)

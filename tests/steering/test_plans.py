from __future__ import annotations

from dataclasses import replace

import pytest

from chunkwise.config.adapter_policy import AdapterPolicy, PriceTable
from chunkwise.config.policy import ChunkerPolicy, InvalidPolicy, RankPolicy, SteeringPolicy
from chunkwise.core import AdapterInfo, ChunkDecision, RungTable, SequenceSignals
from chunkwise.steering import SteeringController
from chunkwise.steering.plans import RankPlan, check_sections, make_plan
from chunkwise.steering.sequence import SteeredSequence

ADAPTER = AdapterInfo("a", "hash", 8, (0, 0.25, 2, 8), (0.0, 0.25, 0.5, 1.0), (0.0, 0.25, 2.0, 8.0))
SECTION = AdapterPolicy("hash", ADAPTER.rungs, ADAPTER.kept_energy, answer_rung=2, prompt_rung=0.25)
# Token 1 needs rank 2, token 2 needs none, any other a little.
PRICES = PriceTable((1.0, 0.0, 0.0, 0.0), {1: (9.0, 9.0, 0.0, 0.0), 2: (0.0, 0.0, 0.0, 0.0)})
PRICED = replace(SECTION, prompt_rung=None, prices=PRICES, price_per_rank=0.5)


def plan(policy: SteeringPolicy) -> RankPlan:
    made = make_plan(policy, ADAPTER)
    assert made is not None
    return made


def rungs(made: RankPlan, prompt: list[int]) -> list[tuple[int, float | None]]:
    return [(start, choice.rung) for start, choice in made.chunks(prompt)]


def test_without_calibration_an_adapter_runs_at_its_trained_rank() -> None:
    assert rungs(plan(SteeringPolicy()), [5, 6, 7]) == [(0, 8)]


def test_roles_take_the_smallest_rung_that_is_enough_and_the_answer_starts_at_the_prompts_last_token() -> None:
    policy = SteeringPolicy(rank=RankPolicy(prompt_rung=0.5, answer_rung=64))
    assert rungs(plan(policy), [5, 6, 7, 8]) == [(0, 2), (3, 8)]
    assert rungs(plan(policy), [5]) == [(0, 8)]


def test_complexity_is_no_plan() -> None:
    assert make_plan(SteeringPolicy(rank=RankPolicy(source="complexity")), ADAPTER) is None


def test_a_section_rules_its_own_adapter_alone() -> None:
    policy = SteeringPolicy(rank=RankPolicy(source="complexity"), adapters={"a": SECTION})
    assert rungs(plan(policy), [5, 6, 7]) == [(0, 0.25), (2, 2)]
    assert make_plan(policy, replace(ADAPTER, adapter_id="b")) is None


def test_prices_buy_rank_where_it_is_worth_it() -> None:
    policy = SteeringPolicy(chunker=ChunkerPolicy(min_length=1), adapters={"a": PRICED})
    assert rungs(plan(policy), [5, 1, 1, 2, 5, 9]) == [(0, 0.25), (1, 2), (3, 0), (4, 0.25), (5, 2)]
    dear = replace(PRICED, price_per_rank=100.0)
    assert rungs(plan(replace(policy, adapters={"a": dear})), [5, 1, 2, 9]) == [(0, 0), (3, 2)]
    free = replace(PRICED, price_per_rank=0.0, prices=PriceTable((1.0, 0.5, 0.1, 0.0), {}))
    assert rungs(plan(replace(policy, adapters={"a": free})), [5, 1, 2, 9]) == [(0, 8), (3, 2)]


def test_price_chunks_have_the_least_length() -> None:
    policy = SteeringPolicy(chunker=ChunkerPolicy(min_length=3), adapters={"a": PRICED})
    assert rungs(plan(policy), [2, 2, 2, 2, 2, 1, 2, 2, 2, 2]) == [(0, 0), (3, 2), (6, 0), (9, 2)]
    assert rungs(plan(policy), [2, 1, 9]) == [(0, 2)]
    own = SteeringPolicy(adapters={"a": replace(PRICED, min_length=3)})
    assert plan(own).chunks([2] * 40 + [1, 9]) == plan(policy).chunks([2] * 40 + [1, 9])


def test_scales_are_the_sections_or_follow_the_energy() -> None:
    policy = SteeringPolicy(rank=RankPolicy(energy_exponent=1.0), adapters={"a": SECTION})
    assert [choice.scale for _, choice in plan(policy).chunks([1, 2])] == [2.0, pytest.approx(2**0.5)]
    scaled = replace(policy, adapters={"a": replace(SECTION, scales=(1.0, 1.5, 1.2, 1.0))})
    assert [choice.scale for _, choice in plan(scaled).chunks([1, 2])] == [1.5, 1.2]


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (replace(ADAPTER, content_hash="other"), r'adapters\."a" was made for weights \'hash\'.*\'other\'; run'),
        (replace(ADAPTER, rungs=(0, 0.5, 2, 8)), r"rungs \(0, 0\.25, 2, 8\).*\(0, 0\.5, 2, 8\).*chunkwise calibrate"),
        (replace(ADAPTER, kept_energy=(0.0, 0.3, 0.5, 1.0)), r"keep \(0\.0, 0\.25, 0\.5, 1\.0\).*0\.3"),
    ],
)
def test_a_section_for_other_weights_or_another_ladder_is_refused(served: AdapterInfo, message: str) -> None:
    policy = SteeringPolicy(adapters={"a": SECTION})
    with pytest.raises(InvalidPolicy, match=message):
        make_plan(policy, served)
    with pytest.raises(InvalidPolicy, match=message):
        check_sections(policy, [served])


def test_last_digits_of_energies_do_not_matter_and_sections_of_nobody_are_named() -> None:
    policy = SteeringPolicy(adapters={"a": SECTION, "ghost": SECTION})
    assert check_sections(policy, [replace(ADAPTER, kept_energy=(0.0, 0.250001, 0.5, 1.0))]) == ["ghost"]


def test_answer_tokens_are_sent_as_a_table_once_and_reported_with_their_ranks() -> None:
    section = replace(SECTION, answer_tokens={7: 8, 9: 0}, prompt_rung=2)
    policy = SteeringPolicy(chunker=ChunkerPolicy(min_length=4, max_length=4), adapters={"a": section})
    controller = SteeringController(policy)
    controller.admit(1, [5, 5, 7], ADAPTER)
    update = controller.flush()
    assert update is not None
    assert update.tables == (RungTable(1, {7: 8, 9: 0}),)
    assert update.chunks == (ChunkDecision(1, 0, 2), ChunkDecision(1, 2, 2, table=1))
    for token_id in (9, 5, 9, 7):
        controller.extend(1, token_id)
    ranks = [2.0, 2.0, 8.0, 0.0, 2.0, 0.0]
    assert controller.report(1, 6).mean_rank == pytest.approx(sum(ranks) / 6)
    assert [chunk.rank for chunk in controller.report(1, 5).chunks] == [2.0, pytest.approx(10.0 / 3)]
    controller.admit(2, [5], ADAPTER)
    later = controller.flush()
    assert later is not None
    assert (later.tables, later.chunks) == ((), (ChunkDecision(2, 0, 2, table=1),))


def test_an_answer_keeps_its_rank_while_the_kv_cache_is_cut_on() -> None:
    chunker = ChunkerPolicy(min_length=4, max_length=4)
    policy = SteeringPolicy(chunker=chunker, adapters={"a": SECTION})
    steered = SteeredSequence(1, [7] * 10, policy, plan(policy))
    assert [(decision.start, decision.rung) for decision in steered.decisions()] == [(0, 0.25), (9, 2)]
    for position in range(9, 24):
        if position >= 10:
            steered.extend(position)
        assert steered.observe(SequenceSignals(1, position, 0.5)) is None
    chunks = steered.report(24).chunks
    assert [chunk.start for chunk in chunks] == [0, 4, 8, 9, 13, 17, 21]
    assert [chunk.rung for chunk in chunks] == [0.25, 0.25, 0.25, 2, 2, 2, 2]
    assert steered.report(24).mean_rank == pytest.approx((9 * 0.25 + 15 * 2) / 24)

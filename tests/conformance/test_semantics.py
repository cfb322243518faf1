"""Checklist items 37 to 48: what the parameters mean."""

from __future__ import annotations

import math
import re
from itertools import accumulate
from typing import Any

import pytest

from chunkwise.pb import generate_pb2 as pb
from conformance.player import Answer, Player

LETTERS = "[a-z ]{30}"


def shaped(regex: str) -> dict[str, Any]:
    """Parameters of an answer that matches a regular expression."""
    return {"grammar": regex, "grammar_type": pb.GRAMMAR_TYPE_REGEX}


def first_with(answer: Answer, stop: str) -> int:
    """Number of tokens after which an answer holds ``stop``."""
    return next(i for i, text in enumerate(accumulate(answer.texts), 1) if stop in text)


def test_item_37_a_warper_makes_it_sample_also_without_do_sample(player: Player) -> None:
    greedy = [player.request(new=8, parameters={"seed": seed}) for seed in (1, 2, 3)]
    assert len({tuple(answer.ids) for answer in player.run(*greedy)}) == 1
    warpers: list[dict[str, Any]] = [
        {"temperature": 1.5},
        {"top_k": 200},
        {"top_p": 0.99},
        {"typical_p": 0.99},
        {"do_sample": True},
    ]
    for warper in warpers:
        asked = [player.request(new=8, parameters={**warper, "seed": seed}) for seed in (1, 2, 3)]
        answers = player.run(*asked)
        assert len({tuple(answer.ids) for answer in answers}) == 3
        assert [answer.end.seed for answer in answers] == [1, 2, 3]


def test_item_38_a_seed_gives_the_same_text_whoever_joins(player: Player) -> None:
    asked = player.request(new=16, parameters={"temperature": 1.4, "do_sample": True, "seed": 2**63 + 5})
    alone = player.alone(asked)
    assert player.alone(asked).ids == alone.ids
    cached = player.follow(player.prefill(asked))
    for seed in range(3):
        joining = player.request(new=4, seed=seed, parameters={"do_sample": True, "seed": seed})
        other = player.follow(player.prefill(joining))
        assert cached is not None
        assert other is not None
        cached = player.follow(player.decode(other, cached))
    assert player.finish(cached, asked)[0].ids == alone.ids


def test_item_39_penalties_count_prompt_and_output_and_top_k_1_is_greedy(player: Player) -> None:
    shown: dict[str, Any] = {"prefill_logprobs": True, "top_n_tokens": 200}
    plain = player.request(40, 30, **shown)
    harsh = player.request(40, 30, parameters={"repetition_penalty": 1e6})
    bare, varied = player.run(plain, harsh)
    assert len(set(varied.ids)) == 30 > len(set(bare.ids))
    prompt = list(bare.generations[0].prefill_tokens.ids)
    if prompt:
        assert not set(varied.ids) & set(prompt)
        # Of token v occurring c times among n the score falls by penalty * c / n: all differences are known.
        (damped,) = player.run(player.request(40, 2, parameters={"frequency_penalty": 2.0}, **shown))
        before, after = (first_step(answer) for answer in (bare, damped))
        shift = {id: after[id] - before[id] + 2.0 * prompt.count(id) / len(prompt) for id in before.keys() & after}
        assert any(id in prompt for id in shift)
        assert max(shift.values()) - min(shift.values()) < 1e-3
    (narrow,) = player.run(player.request(40, 30, parameters={"top_k": 1, "do_sample": True, "temperature": 0.7}))
    assert narrow.ids == bare.ids
    assert all(generation.tokens.logprobs[0] == 0 for generation in narrow.generations)


def first_step(answer: Answer) -> dict[int, float]:
    """Log-probabilities of the tokens that the first step reported as most likely."""
    top = answer.generations[0].top_tokens[0]
    return dict(zip(top.ids, top.logprobs, strict=True))


def test_item_40_length_comes_before_eos_and_eos_before_stop_sequences(player: Player) -> None:
    heeding = {"ignore_eos_token": False}
    (short,) = player.run(player.request(new=20, parameters=shaped("ab"), stopping=heeding))
    assert short.end.finish_reason == pb.FINISH_REASON_EOS_TOKEN
    count = len(short.ids)
    (cut,) = player.run(player.request(new=count, parameters=shaped("ab"), stopping=heeding))
    assert cut.ids == short.ids
    assert cut.end.finish_reason == pb.FINISH_REASON_LENGTH
    stopping = {**heeding, "stop_sequences": [short.texts[-1]]}
    (both,) = player.run(player.request(new=20, parameters=shaped("ab"), stopping=stopping))
    assert both.ids == short.ids
    assert both.end.finish_reason == pb.FINISH_REASON_EOS_TOKEN


def test_item_40_stop_sequences_are_found_and_kept(player: Player) -> None:
    free = player.request(new=20, parameters=shaped(LETTERS))
    (whole,) = player.run(free)
    across = whole.texts[9] + whole.texts[10]
    for stops in ([whole.texts[6]], [across], ["never said", across, whole.texts[12]]):
        at = min(first_with(whole, stop) for stop in stops if stop in "".join(whole.texts))
        for new in (20, at):
            (answer,) = player.run(
                player.request(new=new, parameters=shaped(LETTERS), stopping={"stop_sequences": stops})
            )
            assert answer.ids == whole.ids[:at]
            assert answer.end.text == "".join(whole.texts[:at])
            wanted = pb.FINISH_REASON_LENGTH if new == at else pb.FINISH_REASON_STOP_SEQUENCE
            assert answer.end.finish_reason == wanted


def test_item_41_every_end_of_sequence_id_ends_and_none_is_in_the_text(player: Player) -> None:
    heeding = {"ignore_eos_token": False}
    (answer,) = player.run(player.request(new=20, parameters=shaped("ab"), stopping=heeding))
    assert answer.end.finish_reason == pb.FINISH_REASON_EOS_TOKEN
    assert answer.end.text == answer.spoken == "ab"
    last = answer.generations[-1].tokens
    assert list(last.is_special) == [True]
    assert last.texts[0]
    if not player.eos_ids:
        pytest.skip("the end-of-sequence ids of a foreign server are not known; the grammar's end was checked")
    # Sampled at a high temperature, answers contain all of them sooner or later.
    wild = {"temperature": 3.0, "do_sample": True}
    missing = set(player.eos_ids)
    for seed in range(8):
        asked = [player.request(new=80, parameters={**wild, "seed": 40 * seed + i}) for i in range(30)]
        heeded = [player.again(request) for request in asked]
        for request in heeded:
            request.stopping_parameters.ignore_eos_token = False
        answers = player.run(*asked, *heeded)
        for free, stopped in zip(answers[:30], answers[30:], strict=True):
            at = next((i for i, id in enumerate(free.ids, 1) if id in player.eos_ids), 80)
            assert stopped.ids == free.ids[:at]
            assert stopped.end.finish_reason == (pb.FINISH_REASON_EOS_TOKEN if at < 80 else pb.FINISH_REASON_LENGTH)
            missing -= set(stopped.ids)
        if not missing:
            return
    raise AssertionError(f"no answer contained {missing}")


def test_item_42_token_texts_concatenate_to_the_answer(player: Player) -> None:
    for seed, regex in enumerate(["[é漢😀]{4}", "(😀漢字){2}"]):
        asked = player.request(new=60, seed=seed, parameters=shaped(regex), stopping={"ignore_eos_token": False})
        (answer,) = player.run(asked)
        assert answer.end.text == answer.spoken
        assert re.fullmatch(regex, answer.end.text)
        cuts = [player.again(asked) for _ in range(1, min(len(answer.ids), 12))]
        for new, cut in enumerate(cuts, 1):
            cut.stopping_parameters.max_new_tokens = new
        for new, part in enumerate(player.run(*cuts), 1):
            assert part.end.text == part.spoken
            assert answer.end.text.startswith(part.end.text)
            assert part.end.text or new < 4, "an answer that ends inside a character keeps what came before it"


def test_item_43_a_regex_is_matched_and_a_bad_one_harms_its_own_request(player: Player) -> None:
    heeding: dict[str, Any] = {"stopping": {"ignore_eos_token": False}, "new": 30}
    good = [player.request(parameters=shaped(regex), **heeding) for regex in (r"\d{3}-\d{4}", "(yes|no), [A-Z]{4}")]
    plain = player.request(new=10)
    bad = player.request(parameters=shaped("(unclosed["), **heeding)
    impossible = player.request(parameters=shaped("a(?!b)"), **heeding)
    alone = [player.alone(request).ids for request in (*good, plain)]
    answers = player.run(good[0], bad, plain, impossible, good[1])
    assert [answers[i].ids for i in (0, 4, 2)] == alone
    assert all(re.fullmatch(r.parameters.grammar, player.answer(r.id).end.text) for r in good)
    for refused in (answers[1], answers[3]):
        assert len(refused.ids) == 1
        assert refused.end.finish_reason != pb.FINISH_REASON_LENGTH
        assert refused.error or not player.tells_errors


def test_item_44_prefill_tokens_come_once_and_cover_the_prompt(player: Player) -> None:
    asked, other = player.request(40, 4, prefill_logprobs=True), player.request(40, 4)
    cached = player.follow(player.prefill(asked, other))
    player.finish(cached, asked, other)
    first, *later = player.answer(asked.id).generations
    assert not any(generation.HasField("prefill_tokens") for generation in later)
    assert not any(generation.HasField("prefill_tokens") for generation in player.answer(other.id).generations)
    if not first.HasField("prefill_tokens"):
        pytest.skip("the server does not report prompt logprobs; start it with REQUEST_LOGPROBS=1")
    prompt = first.prefill_tokens
    assert len(prompt.ids) == len(prompt.logprobs) == len(prompt.texts) == 40
    assert math.isnan(prompt.logprobs[0])
    assert all(logprob <= 0 for logprob in prompt.logprobs[1:])


def test_item_45_top_tokens_are_sorted_and_clamped(player: Player) -> None:
    for n in (1, 5, 1_000_000):
        (answer,) = player.run(player.request(new=3, top_n_tokens=n))
        for generation in answer.generations:
            assert len(generation.top_tokens) == len(generation.tokens.ids)
            for chosen, top in zip(generation.tokens.logprobs, generation.top_tokens, strict=True):
                assert len(top.ids) == len(top.logprobs) == len(top.texts) == len(top.is_special)
                assert len(set(top.ids)) == len(top.ids) >= min(n, 2)
                assert list(top.logprobs) == sorted(top.logprobs, reverse=True)
                assert top.logprobs[0] == chosen, "a greedy token is the most likely one"
    (none,) = player.run(player.request(new=3))
    assert not any(generation.top_tokens for generation in none.generations)


def test_item_46_truncate_keeps_the_last_tokens(player: Player) -> None:
    def prompt(tokens: int, text: str, special: bool) -> list[int]:
        asked = player.request(tokens, 2, text=text, prefill_logprobs=True)
        asked.add_special_tokens = special
        (answer,) = player.run(asked)
        return list(answer.generations[0].prefill_tokens.ids)

    tail = "and this is the end of a long text, which stays."
    whole = prompt(200, tail, special=False)
    if not whole:
        pytest.skip("the server does not report the prompt; start it with REQUEST_LOGPROBS=1")
    with_special = prompt(200, tail, special=True)
    added = len(with_special) - len(whole)
    assert added >= 0
    assert [id for id in with_special if id in whole][-len(whole) :] == whole
    for count in (1, 7, len(whole) - 1):
        assert prompt(count, "x" * 90 + tail, special=False) == whole[-count:]
        cut = prompt(count, "x" * 90 + tail, special=True)
        assert len(cut) == count
        assert cut[-max(count - added, 1) :] == with_special[-max(count - added, 1) :] or count == 1


def test_item_47_adapters_answer_alone_as_in_a_mixed_batch_and_unknown_ones_do_not(player: Player) -> None:
    names: list[str | None] = [None, *player.adapters]
    asked = [player.request(30, 10, seed=5, adapter_id=name) for name in names]
    unknown = player.request(30, 10, seed=5, adapter_id="nobody/nothing")
    base = [player.request(30, 10, seed=5, adapter_id=name) for name in player.base_names]
    alone = [player.alone(request).ids for request in asked]
    assert len({tuple(ids) for ids in alone}) == len(names), "an adapter that changes nothing would prove nothing"
    answers = player.run(*asked, unknown, *base)
    assert [answer.ids for answer in answers[: len(asked)]] == alone
    assert all(answer.ids == alone[0] for answer in answers[len(asked) + 1 :]), "the base model's name is no adapter"
    refused = answers[len(asked)]
    if player.tells_errors:
        # Not as in TGI, whose base model answers in the adapter's place (its issue 2505).
        assert "nobody/nothing" in refused.error
        assert (len(refused.ids), refused.end.text) == (1, "")
        assert refused.end.finish_reason == pb.FINISH_REASON_EOS_TOKEN
    else:
        assert refused.ids == alone[0]


def test_item_48_length_is_never_reported_early(player: Player) -> None:
    """For every other answer of this suite `Player` checks the same."""
    limits = player.router.limits
    for tokens, new in ((1, 1), (1, 20), (limits.max_input_tokens - 20, 20)):
        asked = player.request(tokens, new)
        (answer,) = player.run(asked)
        assert answer.end.finish_reason == pb.FINISH_REASON_LENGTH
        assert len(answer.ids) == answer.end.generated_tokens == new
    if player.tells_errors:
        over = player.request(limits.max_total_tokens - 4, 60)
        neighbour = player.request(new=5)
        refused, served = player.run(over, neighbour)
        assert "max_total_tokens" in refused.error
        assert refused.end.finish_reason != pb.FINISH_REASON_LENGTH
        assert len(served.ids) == 5

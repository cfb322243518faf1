"""The in-process stack against the shard as it is served: same tokens, same ranks, whatever shares the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chunkwise.core import GenerationFailed, InvalidRequest
from chunkwise.evaluation.driver import Evaluator
from chunkwise.evaluation.jobs import Job
from chunkwise.evaluation.modes import BASE, SteeringMode, fixed_rung
from conftest import TinyWorld
from evaluation.worlds import ADAPTIVE, FULL, POLICY, evaluator
from serving import Driver, request

TEXTS = ("Hello there, General.", "a b a b a b a b a b a b a b", "The quick brown fox jumps over the lazy dog. " * 3)


@pytest.fixture(scope="module")
def stack(tiny: TinyWorld) -> Evaluator:
    return evaluator(tiny)


def jobs(new: int = 24) -> list[Job]:
    return [Job(str(i), tuple(text.encode()), max_new_tokens=new) for i, text in enumerate(TEXTS)]


def test_unsteered_answers_are_those_of_the_served_shard(tiny: TinyWorld, stack: Evaluator) -> None:
    driver = Driver(tiny.model, tiny.adapters)
    for mode in (BASE, FULL):
        served = driver.run(
            *(
                replace(request(i, text, new=24, adapter_id=mode.adapter), prompt_ids=tuple(text.encode()))
                for i, text in enumerate(TEXTS)
            )
        )
        got = [list(outcome.ids) for outcome in stack.run(jobs(), mode)]
        cut = [ids[: ids.index(257) + 1] if 257 in ids else ids for ids in served.values()]
        assert got == cut
        driver.tokens.clear()


@pytest.mark.parametrize("mode", [BASE, FULL, ADAPTIVE], ids=lambda mode: mode.name)
def test_a_batch_gives_what_each_job_gives_alone(stack: Evaluator, mode: SteeringMode) -> None:
    together = stack.run(jobs(), mode)
    for job, outcome in zip(jobs(), together, strict=True):
        (alone,) = stack.run([job], mode)
        assert (alone.ids, alone.text, alone.trace) == (outcome.ids, outcome.text, outcome.trace)
        # Rounding to 8 bits makes more of a difference in the last bit.
        assert alone.logprobs == pytest.approx(outcome.logprobs, abs=1e-3)


def test_jobs_run_in_groups_that_fit_the_cache_in_their_order(tiny: TinyWorld, stack: Evaluator) -> None:
    small = evaluator(tiny, batch_tokens=256)
    many = [Job(str(i), tuple(b"some words to go on" * 3), max_new_tokens=9) for i in range(8)]
    # 66 positions take five pages of 16; three such jobs fit 240.
    assert [[job.key for job in group] for group in small.groups(many)] == [list("012"), list("345"), list("67")]
    assert [outcome.ids for outcome in small.run(many, FULL)] == [outcome.ids for outcome in stack.run(many, FULL)]


def test_the_highest_rung_is_full_rank_and_rung_0_is_the_base(stack: Evaluator) -> None:
    adapter = stack.adapters["a16"]
    scored = [replace(job, forced_ids=tuple(b"forced words")) for job in jobs()]
    for rung, same in ((16, FULL), (0, BASE)):
        fixed = stack.run(scored, fixed_rung(rung, adapter))
        for got, expected in zip(fixed, stack.run(scored, same), strict=True):
            assert got.logprobs == expected.logprobs
            assert set(got.trace.ranks()) == {float(rung)}
            assert [chunk.rung for chunk in got.trace.chunks] == [rung] * len(got.trace.chunks)
            assert got.trace.kv_bytes_mean == expected.trace.kv_bytes_mean
    assert stack.run(scored, fixed_rung(4, adapter))[0].logprobs != stack.run(scored, FULL)[0].logprobs


def test_forced_tokens_are_the_answer_and_end_it(stack: Evaluator) -> None:
    first, second = stack.tokenizer.encode("AB")
    forced = (first, 257, second)
    (outcome,) = stack.run([Job("x", tuple(b"prompt"), forced_ids=forced)], FULL)
    assert outcome.ids == forced
    assert outcome.text == "AB"
    assert outcome.trace.computed == 6 + 2


def test_a_free_answer_ends_at_a_stop_text(stack: Evaluator) -> None:
    (long,) = stack.run([jobs()[0]], FULL)
    stop = long.text[3:5]
    (short,) = stack.run([replace(jobs()[0], stop=(stop,))], FULL)
    assert short.text == long.text[: long.text.index(stop) + len(stop)]


def test_a_job_too_long_is_refused_by_name_before_anything_runs(stack: Evaluator) -> None:
    with pytest.raises(InvalidRequest, match="'long' has 500 prompt tokens and up to 13 more; the limit is 512"):
        stack.groups([*jobs(), Job("long", (65,) * 500, max_new_tokens=13)])


def test_a_failing_job_is_named_and_leaves_nothing_behind(stack: Evaluator) -> None:
    with pytest.raises(GenerationFailed, match="item 'bad' failed: prompt id 999 is beyond"):
        stack.run([*jobs(), Job("bad", (999,))], ADAPTIVE)
    first, second = (stack.run(jobs(), ADAPTIVE) for _ in range(2))
    assert [outcome.ids for outcome in first] == [outcome.ids for outcome in second]


def test_a_policy_without_an_adapter_steers_the_cache_alone(stack: Evaluator) -> None:
    long = [replace(job, max_new_tokens=60) for job in jobs()]
    plain = stack.run(long, BASE)
    compressed = stack.run(long, SteeringMode("kv", None, POLICY))
    assert sum(o.trace.kv_bytes_mean for o in compressed) < sum(o.trace.kv_bytes_mean for o in plain)
    assert {rank for outcome in compressed for rank in outcome.trace.ranks()} == {0.0}

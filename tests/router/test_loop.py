from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkwise.config.settings import Limits
from chunkwise.core import (
    CachedBatch,
    GenerationFailed,
    GenerationRequest,
    InvalidRequest,
    RequestError,
    StepResult,
    StepSignals,
)
from chunkwise.router.answer import Answer, Event
from chunkwise.router.api.serving import Serving
from chunkwise.router.loop import ServingStopped
from chunkwise.router.shard_group import ShardLost
from chunkwise.steering import SteeringController
from fakes import Call, FakeShards, toy_text
from routing import events, request, routing, settled, write_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


def text_of(received: list[Event]) -> str:
    ending = received[-1].ending
    assert ending is not None
    assert ending.text.text == "".join(event.token.text for event in received if not event.token.special)
    return ending.text.text


async def first(answer: Answer) -> Event:
    return await anext(answer)


async def test_one_request_is_one_prefill_and_then_decodes(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir, policy=None) as serving:
        received = await events(serving.loop.submit(request(5, 4)))
        assert text_of(received) == toy_text(request(5, 4), 4)
        assert [event.ending is None for event in received] == [True, True, True, False]
        assert shards.named("prefill", "decode") == [
            Call("prefill", (1,), 0, 0),
            Call("decode", (1,), 0, 0),
            Call("decode", (1,), 0, 0),
            Call("decode", (1,), 0, 0),
        ]
        assert not shards.named("steer", "signals")
        await settled(shards, serving)


async def test_a_request_that_comes_later_joins_the_batch(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir) as serving:
        early = serving.loop.submit(request(5, 12))
        await first(early)
        late = serving.loop.submit(request(9, 3))
        assert text_of(await events(late)) == toy_text(request(9, 3), 3)
        rest = await events(early)
        assert rest[-1].ending is not None
        assert rest[-1].ending.text.text == toy_text(request(5, 12), 12)
        assert Call("decode", (1, 2)) in [Call(call.name, call.ids) for call in shards.calls]
        await settled(shards, serving)


async def test_ids_are_never_used_twice(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir) as serving:
        answers = [serving.loop.submit(request()) for _ in range(3)]
        answers[1].cancel()
        await events(answers[0])
        await events(serving.loop.submit(request()))
        admitted = [id for call in shards.named("prefill") for id in call.ids]
        assert admitted == [1, 3, 4]


async def test_a_long_prompt_is_computed_over_several_steps(model_dir: Path) -> None:
    shards = FakeShards(step_tokens=16)
    limits = Limits(max_batch_prefill_tokens=16)
    async with routing(shards, model_dir, limits=limits, policy=None) as serving:
        received = await events(serving.loop.submit(request(50, 3)))
        assert text_of(received) == toy_text(request(50, 3), 3)
        assert [call.name for call in shards.named("prefill", "decode")] == ["prefill"] + ["decode"] * 5
        await settled(shards, serving)


@pytest.mark.parametrize("signal_seconds", [0.0, 0.002])
@pytest.mark.parametrize("step_seconds", [0.0, 0.02])
async def test_signals_are_observed_after_the_next_launch_and_before_the_one_after(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, signal_seconds: float, step_seconds: float
) -> None:
    """The contract of one step's lag, whether the signals come before they are due or after the step is done, and
    whether or not the step after is sent while it runs."""
    shards = FakeShards(signal_seconds=signal_seconds, step_seconds=step_seconds)
    observe = SteeringController.observe

    def recorded(self: SteeringController, signals: StepSignals) -> None:
        shards.calls.append(Call("observe", step=signals.step))
        observe(self, signals)

    monkeypatch.setattr(SteeringController, "observe", recorded)
    async with routing(shards, model_dir) as serving:
        await events(serving.loop.submit(request(5, 20, adapter="law")))
        await events(serving.loop.submit(request(7, 4)))
    ahead = [call.step for call in shards.named("send_ahead")]
    # A step that is over before the router comes to it is not overtaken, and a busy machine decides which those are.
    assert set(ahead) <= {*range(3, 21), 23, 24} and bool(ahead) == bool(step_seconds)
    for step in ahead:
        sent = shards.calls.index(Call("send_ahead", step=step))
        assert Call("observe", step=step - 2) in shards.calls[:sent]
        assert Call("observe", step=step - 1) not in shards.calls[:sent]
    order = [(call.name, call.step) for call in shards.named("prefill", "decode", "observe")]
    launched = [step for name, step in order if name != "observe"]
    assert launched == list(range(1, 25))
    assert [step for name, step in order if name == "observe"] == list(range(1, 24))
    for step in range(1, 24):
        observed = order.index(("observe", step))
        assert order[observed - 1][1] == step + 1, "the step after runs"
        assert order[observed + 1 : observed + 2] in ([("decode", step + 2)], [("prefill", step + 2)], [])


async def test_each_step_names_the_last_update_that_was_sent(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir) as serving:
        await events(serving.loop.submit(request(9, 40, adapter="law")))
    sent = 0
    for call in shards.calls:
        if call.name == "steer":
            sent += 1
        if call.name in ("prefill", "decode"):
            assert call.seq == sent
    assert sent > 3
    assert shards.updates[0].chunks[0].start == 0


async def test_the_report_tiles_prompt_and_answer(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir) as serving:
        received = await events(serving.loop.submit(request(9, 20, adapter="law")))
    ending = received[-1].ending
    assert ending is not None
    edges = [chunk.start for chunk in ending.report.chunks] + [ending.report.chunks[-1].end]
    assert edges[0] == 0
    assert edges[-1] == 28, "nine prompt tokens, and twenty less the last, which is never computed"
    assert [chunk.end for chunk in ending.report.chunks] == edges[1:]
    assert 2.0 <= ending.report.mean_rank <= 8.0


async def test_without_steering_the_report_is_one_chunk_at_the_trained_rank(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir, policy=None) as serving:
        for adapter, rank in (("law", 8.0), (None, 0.0)):
            ending = (await events(serving.loop.submit(request(9, 20, adapter=adapter))))[-1].ending
            assert ending is not None
            (chunk,) = ending.report.chunks
            assert (chunk.start, chunk.end, chunk.rank, ending.report.mean_rank) == (0, 28, rank, rank)


async def test_cancelling_one_of_two_filters_the_batch_behind_the_release(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir) as serving:
        gone = serving.loop.submit(request(5, 50, adapter="law"))
        stays = serving.loop.submit(request(6, 10))
        await first(gone)
        gone.cancel()
        assert text_of(await events(stays)) == toy_text(request(6, 10), 10)
        (filtered,) = shards.named("filter_batch")
        assert filtered.ids == (2,)
        before = shards.calls[: shards.calls.index(filtered)]
        assert before[-1] == Call("steer", (1,), filtered.seq)
        assert all(1 not in call.ids for call in shards.calls[len(before) :])
        await settled(shards, serving)


async def test_cancelling_the_last_one_clears_its_batch(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir) as serving:
        answer = serving.loop.submit(request(5, 50, adapter="law"))
        await first(answer)
        answer.cancel()
        await settled(shards, serving)
        assert not shards.named("filter_batch")
        # The first clear is the router's at start.
        assert [call.ids for call in shards.named("clear_cache")] == [(), (1,)]
        assert 1 in shards.updates[-1].released


async def test_a_waiting_request_disappears_without_a_trace(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir, limits=Limits(max_batch_size=1)) as serving:
        running = serving.loop.submit(request(5, 10))
        await first(running)
        queue_size = partial(serving.metrics.registry.get_sample_value, "tgi_queue_size")
        waiting = serving.loop.submit(request(6, 10))
        assert queue_size() == 1
        waiting.cancel()
        assert queue_size() == 0
        await events(running)
        await settled(shards, serving)
        assert serving.loop.in_flight == 0
        assert all(2 not in call.ids for call in shards.calls)


async def test_cancelling_after_the_end_does_nothing(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir) as serving:
        answer = serving.loop.submit(request(5, 2))
        await events(answer)
        answer.cancel()
        assert await events(answer) == []
        assert len(await events(serving.loop.submit(request(5, 2)))) == 2


@pytest.mark.parametrize("method", ["prefill", "decode"])
async def test_a_failing_step_ends_its_requests_and_no_others(model_dir: Path, method: str) -> None:
    shards = FakeShards(failures={method: [GenerationFailed("out of luck")]})
    async with routing(shards, model_dir) as serving:
        for answer in [serving.loop.submit(request(5 + i, 5, adapter="law")) for i in range(2)]:
            with pytest.raises(GenerationFailed, match="out of luck"):
                await events(answer)
        assert text_of(await events(serving.loop.submit(request(7, 5)))) == toy_text(request(7, 5), 5)
        await settled(shards, serving)
        assert Call("clear_cache", (), 2) in shards.calls


async def test_a_failing_filter_ends_the_batch(model_dir: Path) -> None:
    shards = FakeShards(failures={"filter_batch": [GenerationFailed("cannot filter")]})
    async with routing(shards, model_dir) as serving:
        gone, stays = serving.loop.submit(request(5, 50)), serving.loop.submit(request(6, 50))
        await first(gone)
        gone.cancel()
        with pytest.raises(GenerationFailed, match="cannot filter"):
            await events(stays)
        assert len(await events(serving.loop.submit(request(5, 3)))) == 3
        await settled(shards, serving)


async def test_an_error_of_one_request_leaves_the_others_alone(model_dir: Path) -> None:
    errors = {"bad": RequestError("no such thing", "validation"), "ugly": RequestError("broke", "generation")}
    shards = FakeShards(errors=errors)
    async with routing(shards, model_dir) as serving:
        bad = serving.loop.submit(request(5, 9, text="bad"))
        ugly = serving.loop.submit(request(5, 9, text="ugly"))
        good = serving.loop.submit(request(6, 9))
        with pytest.raises(InvalidRequest, match="no such thing"):
            await events(bad)
        with pytest.raises(GenerationFailed, match="broke"):
            await events(ugly)
        assert text_of(await events(good)) == toy_text(request(6, 9), 9)
        await settled(shards, serving)


async def test_a_lost_shard_ends_the_loop_and_every_request(model_dir: Path) -> None:
    shards = FakeShards(failures={"decode": [ShardLost("shard 1 is gone")]})
    async with routing(shards, model_dir, limits=Limits(max_batch_size=1)) as serving:
        running, waiting = serving.loop.submit(request(5, 9)), serving.loop.submit(request(6, 9))
        for answer in (running, waiting):
            with pytest.raises(ServingStopped, match="shard 1 is gone"):
                await events(answer)
        assert serving.loop.stopped is not None
        with pytest.raises(ServingStopped):
            serving.loop.submit(request())


async def test_a_closing_loop_refuses_new_requests_and_finishes_the_others(model_dir: Path) -> None:
    async with routing(FakeShards(), model_dir) as serving:
        answer = serving.loop.submit(request())
        serving.loop.close()
        with pytest.raises(ServingStopped, match="shutting down"):
            serving.loop.submit(request())
        assert (await events(answer))[-1].ending is not None


async def test_stopping_ends_what_is_in_flight(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir) as serving:
        shards.running.clear()
        answer = serving.loop.submit(request())
        await asyncio.sleep(0)
    with pytest.raises(ServingStopped, match="shutting down"):
        await events(answer)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_clients_do_answers_are_right_and_nothing_is_left(model_dir: Path, data: st.DataObject) -> None:
    """Any mix of arrivals, lengths and cancellations: every complete answer is what the request gets alone."""

    async def client(serving: Serving, wanted: GenerationRequest, patience: int | None, delay: int) -> str | None:
        for _ in range(delay):
            await asyncio.sleep(0)
        answer = serving.loop.submit(wanted)
        received: list[Event] = []
        async for event in answer:
            received.append(event)
            if len(received) == patience:
                answer.cancel()
                return None
        return text_of(received)

    async def scenario() -> None:
        shards = FakeShards(
            step_tokens=data.draw(st.sampled_from([4, 16, 64])), step_seconds=data.draw(st.sampled_from([0.0, 0.0005]))
        )
        limits = Limits(max_batch_prefill_tokens=shards.step_tokens, max_batch_size=data.draw(st.integers(1, 4)))
        plans: list[tuple[GenerationRequest, Any, int]] = data.draw(
            st.lists(
                st.tuples(
                    st.builds(
                        request, st.integers(1, 30), st.integers(1, 20), adapter=st.sampled_from([None, "law", "med"])
                    ),
                    st.one_of(st.none(), st.integers(1, 5)),
                    st.integers(0, 40),
                ),
                min_size=1,
                max_size=8,
            )
        )
        async with routing(shards, model_dir, limits=limits) as serving:
            answers = await asyncio.gather(*(client(serving, *plan) for plan in plans))
            await settled(shards, serving)
        for (wanted, _, _), text in zip(plans, answers, strict=True):
            assert text is None or text == toy_text(wanted, wanted.stopping.max_new_tokens)

    asyncio.run(scenario())


async def test_the_shards_need_not_wait_for_the_router_between_decodes(model_dir: Path) -> None:
    """Every decode but the first is sent while the one before it runs, and none that is sure to be in vain."""
    shards = FakeShards(step_seconds=0.002)
    async with routing(shards, model_dir, policy=None) as serving:
        await events(serving.loop.submit(request(5, 6)))
        await settled(shards, serving)
    assert [call.name for call in shards.named("prefill", "decode", "send_ahead")] == [
        "prefill",
        "decode",
        *["send_ahead", "decode"] * 4,
    ]


async def test_sending_ahead_changes_no_decision(model_dir: Path) -> None:
    def decided(shards: FakeShards) -> list[Any]:
        return [(update.seq, update.chunks, update.kv) for update in shards.updates]

    usual, ahead = FakeShards(), FakeShards(step_seconds=0.002)
    for shards in (usual, ahead):
        async with routing(shards, model_dir) as serving:
            await events(serving.loop.submit(request(20, 40, adapter="law")))
            await settled(shards, serving)
    # The prompt takes two steps: its first chunks are compressed before the last four tokens are computed.
    assert len(ahead.named("send_ahead")) == 39
    assert any(update.kv for update in usual.updates)
    assert decided(ahead) == decided(usual)


async def test_a_batch_may_end_before_the_decode_that_was_sent_ahead(model_dir: Path) -> None:
    shards = FakeShards(step_seconds=0.002, eos_at={"short": 3})
    async with routing(shards, model_dir) as serving:
        received = await events(serving.loop.submit(request(5, 20, text="short")))
        assert text_of(received) == toy_text(request(5, 20), 3)
        assert text_of(await events(serving.loop.submit(request(6, 4)))) == toy_text(request(6, 4), 4)
        await settled(shards, serving)
    assert Call("decode", ()) in [Call(call.name, call.ids) for call in shards.calls]


async def test_who_comes_or_goes_while_a_decode_is_sent_ahead_waits_for_it(model_dir: Path) -> None:
    shards = FakeShards(step_seconds=0.004)
    async with routing(shards, model_dir) as serving:
        gone, stays = serving.loop.submit(request(5, 50)), serving.loop.submit(request(6, 12))
        async with asyncio.timeout(5):
            while not shards.named("send_ahead"):
                await asyncio.sleep(0)
        gone.cancel()
        late = serving.loop.submit(request(7, 3))
        assert text_of(await events(late)) == toy_text(request(7, 3), 3)
        assert text_of(await events(stays)) == toy_text(request(6, 12), 12)
        await settled(shards, serving)
    names = [call.name for call in shards.named("prefill", "decode", "send_ahead", "filter_batch")]
    assert names[:6] == ["prefill", "decode", "send_ahead", "decode", "filter_batch", "prefill"]


async def test_a_step_that_fails_takes_the_one_sent_ahead_along(model_dir: Path) -> None:
    class Unlucky(FakeShards):
        """Its second decode fails at its end, when the third has been sent."""

        async def decode(
            self, batches: Sequence[CachedBatch], seq: int, step: int, may_have_ended: bool = False
        ) -> StepResult:
            result = await super().decode(batches, seq, step, may_have_ended)
            if len(self.named("decode")) == 2:
                self.batches.clear()
                raise GenerationFailed("out of luck")
            return result

    shards = Unlucky(step_seconds=0.002)
    async with routing(shards, model_dir) as serving:
        with pytest.raises(GenerationFailed, match="out of luck"):
            await events(serving.loop.submit(request(5, 9, adapter="law")))
        assert len(shards.named("send_ahead")) == 2
        assert text_of(await events(serving.loop.submit(request(7, 5)))) == toy_text(request(7, 5), 5)
        await settled(shards, serving)


async def test_kv_decisions_reach_the_shards(model_dir: Path) -> None:
    shards = FakeShards()
    async with routing(shards, model_dir) as serving:
        await events(serving.loop.submit(request(20, 30, adapter="law")))
    assert any(update.kv for update in shards.updates)


async def test_a_request_that_the_shards_drop_fails_and_never_hangs(model_dir: Path) -> None:
    class Forgetful(FakeShards):
        async def decode(
            self, batches: Sequence[CachedBatch], seq: int, step: int, may_have_ended: bool = False
        ) -> StepResult:
            result = await super().decode(batches, seq, step, may_have_ended)
            self.batches.clear()
            return replace(result, batch=None, generations=())

    async with routing(Forgetful(), model_dir) as serving, asyncio.timeout(5):
        with pytest.raises(GenerationFailed, match="dropped the request"):
            await events(serving.loop.submit(request(3, 9)))

"""The loop when KV memory is short: who is let in, compressed, pre-empted, and that nobody notices."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkwise.config.policy import KvPolicy, SteeringPolicy
from chunkwise.config.settings import Limits
from chunkwise.core import GenerationFailed, GenerationRequest
from chunkwise.router.answer import Event
from chunkwise.router.api.serving import Serving
from fakes import LIMITS, FakeShards, toy_text
from routing import POLICY, events, request, routing, settled, write_tokenizer

FULL = replace(POLICY, kv=KvPolicy(kind="full"))
PRESSURE = replace(POLICY, kv=replace(POLICY.kv, when="pressure"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


def small(pages: int, **changes: Any) -> FakeShards:
    """Shards with a cache of so many pages of four tokens."""
    limits = replace(LIMITS, max_total_tokens=min(128, 4 * pages), max_supported_total_tokens=4 * pages)
    return FakeShards(kv_pages=pages, limits=limits, **changes)


def limits(growth: int = 4, **changes: Any) -> Limits:
    return Limits(max_batch_prefill_tokens=64, kv_growth_reserve=growth, **changes)


def text_of(received: list[Event]) -> str:
    assert [event.ending is not None for event in received] == [False] * (len(received) - 1) + [True]
    return "".join(event.token.text for event in received)


def preempted(shards: FakeShards) -> list[int]:
    """Ids that joined the batch more than once."""
    joined = [id for call in shards.named("prefill") for id in call.ids]
    return [id for place, id in enumerate(joined) if id in joined[:place]]


async def test_more_is_admitted_than_could_run_to_the_end_together(model_dir: Path) -> None:
    """Twenty pages do not hold three answers of 40 tokens, but three prompts and short answers."""
    shards = small(20, eos_at={"p": 5})
    async with routing(shards, model_dir, limits=limits(), policy=None) as serving:
        await asyncio.gather(*(events(serving.loop.submit(request(8, 40))) for _ in range(3)))
        await settled(shards, serving)
    # How much is free is known once a step has run.
    assert [call.ids for call in shards.named("prefill")] == [(1,), (2, 3)]
    assert not preempted(shards)


async def test_the_youngest_is_pre_empted_and_goes_on_where_it_was(model_dir: Path) -> None:
    shards = small(20)
    wanted = [request(8 + i, 40, adapter="law") for i in range(3)]
    async with routing(shards, model_dir, limits=limits(), policy=FULL) as serving:
        received = await asyncio.gather(*(events(serving.loop.submit(each)) for each in wanted))
        await settled(shards, serving)
        assert serving.metrics.registry.get_sample_value("chunkwise_preemptions_total") == len(preempted(shards))
    assert [text_of(got) for got in received] == [toy_text(each, 40) for each in wanted]
    assert [call.ids for call in shards.named("filter_batch")][:2] == [(1, 2), (1,)], "the oldest always goes on"
    assert preempted(shards) == [2, 3]


async def test_steering_is_that_of_a_request_that_was_never_pre_empted(model_dir: Path) -> None:
    wanted = [request(8 + i, 40, adapter="law") for i in range(3)]
    reports = []
    for shards in (small(18), small(128)):
        async with routing(shards, model_dir, limits=limits(), policy=POLICY) as serving:
            received = await asyncio.gather(*(events(serving.loop.submit(each)) for each in wanted))
            await settled(shards, serving)
        assert bool(preempted(shards)) == (shards.kv_pages == 18)
        reports.append([got[-1].ending.report for got in received if got[-1].ending is not None])
    assert reports[0] == reports[1]
    assert any(chunk.kv != 0 for report in reports[0] for chunk in report.chunks)


async def test_compression_comes_before_pre_emption(model_dir: Path) -> None:
    """The same load that pre-empts with full pages makes do with compressed ones, which a large cache keeps full."""

    async def run(pages: int, policy: SteeringPolicy) -> FakeShards:
        shards = small(pages)
        async with routing(shards, model_dir, limits=limits(), policy=policy) as serving:
            await asyncio.gather(*(events(serving.loop.submit(request(12, 40))) for _ in range(2)))
            await settled(shards, serving)
        return shards

    uncompressed, compressed, roomy = await run(20, FULL), await run(20, PRESSURE), await run(128, PRESSURE)
    assert preempted(uncompressed) == [2]
    assert preempted(compressed) == []
    assert any(update.kv for update in compressed.updates)
    assert not any(update.kv for update in roomy.updates)


async def test_whoever_waits_for_memory_has_those_before_compressed(model_dir: Path) -> None:
    shards = small(20)
    async with routing(shards, model_dir, limits=limits(), policy=PRESSURE) as serving:
        first, second = request(40, 12), request(36, 4)
        answers = [serving.loop.submit(each) for each in (first, second)]
        assert [text_of(await events(answer)) for answer in answers] == [toy_text(first, 12), toy_text(second, 4)]
        await settled(shards, serving)
    joined = [shards.calls.index(call) for call in shards.named("prefill")]
    told = [update.seq for update in shards.updates if any(kv.request_id == 1 for kv in update.kv)]
    assert len(joined) == 2
    assert any(call.name == "steer" and call.seq in told for call in shards.calls[: joined[1]])
    assert any(kv.request_id == 2 for update in shards.updates for kv in update.kv), "who joins compressed ones is too"


async def test_who_gives_up_while_pre_empted_is_forgotten(model_dir: Path) -> None:
    shards = small(20)
    async with routing(shards, model_dir, limits=limits(), policy=FULL) as serving:
        stays, gone = serving.loop.submit(request(8, 60)), serving.loop.submit(request(9, 60, adapter="law"))
        reading = asyncio.create_task(events(gone))
        async with asyncio.timeout(5):
            while not shards.named("filter_batch"):
                await asyncio.sleep(0)
        gone.cancel()
        reading.cancel()
        assert text_of(await events(stays)) == toy_text(request(8, 60), 60)
        await settled(shards, serving)
        assert serving.loop.in_flight == 0
    assert not preempted(shards)


async def test_a_step_that_fails_spares_whoever_is_pre_empted_then(model_dir: Path) -> None:
    shards = small(20)
    async with routing(shards, model_dir, limits=limits(), policy=POLICY) as serving:
        first, second = serving.loop.submit(request(8, 60)), serving.loop.submit(request(9, 60, adapter="law"))
        async with asyncio.timeout(5):
            while not shards.named("filter_batch"):
                await asyncio.sleep(0)
        shards.failures["decode"] = [GenerationFailed("out of luck")]
        with pytest.raises(GenerationFailed, match="out of luck"):
            await events(first)
        assert text_of(await events(second)) == toy_text(request(9, 60, adapter="law"), 60)
        await settled(shards, serving)


def check_order(shards: FakeShards) -> None:
    """Nobody is let in before somebody who came earlier and waits, be it for coming back."""
    out, newest = set[int](), 0
    for place, call in enumerate(shards.calls):
        if call.name == "prefill":
            assert list(call.ids) == sorted(call.ids)
            assert all(id > newest for id in call.ids if id not in out)
            assert not out or min(call.ids) == min(out), f"{call} overtakes {out}"
            out -= set(call.ids)
            assert not out or max(call.ids) < min(out), f"{call} overtakes {out}"
            newest = max(newest, *call.ids)
        come_back = {id for later in shards.calls[place:] if later.name == "prefill" for id in later.ids}
        out |= shards.filtered.get(place, set()) & come_back


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_clients_do_nothing_is_lost_and_memory_suffices(model_dir: Path, data: st.DataObject) -> None:
    """Arrivals, lengths, cancellations, any cache that holds one request: every complete answer is the whole answer,
    the cache is never overdrawn, which the shards check, and nobody is overtaken."""

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
        shards = small(
            data.draw(st.integers(14, 40)),
            step_tokens=data.draw(st.sampled_from([4, 16, 64])),
            step_seconds=data.draw(st.sampled_from([0.0, 0.0005])),
        )
        bounds = replace(
            limits(data.draw(st.integers(1, 12))),
            max_batch_prefill_tokens=shards.step_tokens,
            max_batch_size=data.draw(st.sampled_from([2, None])),
        )
        some = st.builds(request, st.integers(1, 30), st.integers(1, 24), adapter=st.sampled_from([None, "law", "med"]))
        plans: list[tuple[GenerationRequest, int | None, int]] = data.draw(
            st.lists(
                st.tuples(some, st.one_of(st.none(), st.none(), st.integers(1, 5)), st.integers(0, 40)),
                min_size=2,
                max_size=8,
            )
        )
        policy = data.draw(st.sampled_from([None, FULL, PRESSURE, POLICY]))
        async with routing(shards, model_dir, limits=bounds, policy=policy) as serving:
            answers = await asyncio.gather(*(client(serving, *plan) for plan in plans))
            await settled(shards, serving)
        for (wanted, _, _), text in zip(plans, answers, strict=True):
            assert text is None or text == toy_text(wanted, wanted.stopping.max_new_tokens)
        check_order(shards)

    asyncio.run(scenario())

"""A request that the loop pre-empts and resumes, over a real engine: its answer is the one it gets in a roomy cache."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import pytest

from chunkwise.config.policy import KvPolicy, SteeringPolicy
from chunkwise.config.settings import Limits, RouterSettings
from chunkwise.core import GenerationRequest, Grammar, SamplingParams
from chunkwise.router.answer import Event
from chunkwise.router.server import prepare
from conftest import TinyWorld
from evaluation.worlds import POLICY
from in_process import EngineShards
from serving import Driver, request

KEEP = KvPolicy(
    kind="keep", when="always", keep_percent=50, kept_format="int4", sink_tokens=16, recent_tokens=16, block_tokens=32
)
MIXED = replace(KEEP, kind="complexity", easy_below=0.5, hard_above=0.6, easy_drop_percent=50, recent_tokens=8)
POLICIES = {
    "plain": None,
    "full": replace(POLICY, kv=KvPolicy(kind="full")),
    "int8": POLICY,
    "keep": replace(POLICY, kv=KEEP),
    "complexity": replace(POLICY, kv=MIXED),
}
SAMPLED = SamplingParams(temperature=1.2, top_p=0.95, repetition_penalty=1.1, do_sample=True)


def asked() -> list[GenerationRequest]:
    """Six requests of all kinds, with prompts of 20 to 70 tokens and answers of up to 90."""
    texts = [f"{i} " * 5 + "It was the best of times, it was the worst of times, " * 2 for i in range(6)]
    kinds = (
        {"adapter_id": "a16"},
        {"sampling": replace(SAMPLED, seed=5)},
        {"adapter_id": "a8", "sampling": replace(SAMPLED, seed=6)},
        {"sampling": SamplingParams(grammar=Grammar("regex", "[a-z]{3,200}"))},
        {"adapter_id": "a4", "top_n_tokens": 2},
        {"adapter_id": "a16", "sampling": SamplingParams(watermark=True)},
    )
    return [
        request(0, "", 90, prompt_ids=tuple(text[: 20 + 10 * i].encode()), **kind)
        for i, (text, kind) in enumerate(zip(texts, kinds, strict=True))
    ]


async def served(
    tiny: TinyWorld, requests: Sequence[GenerationRequest], policy: SteeringPolicy | None, tokens: int
) -> tuple[list[list[Event]], float]:
    """The events of requests that are sent together, and how often one was pre-empted."""
    driver = Driver(tiny.model, tiny.adapters, total_tokens=tokens)
    limits = Limits(max_batch_prefill_tokens=64, kv_growth_reserve=2)
    settings = RouterSettings("tiny", tiny.model, ("unix:///none",), limits=limits, policy=policy)
    serving = await prepare(settings, EngineShards(driver.engine, driver.decisions))
    task = asyncio.create_task(serving.loop.run())
    try:
        answers = [serving.loop.submit(each) for each in requests]
        received = [[event async for event in answer] for answer in answers]
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    driver.engine.check_integrity()
    assert driver.engine.state().sequences == 0
    count = serving.metrics.registry.get_sample_value("chunkwise_preemptions_total")
    assert count is not None
    return received, count


@pytest.mark.parametrize(
    ("name", "pages"), [("plain", 20), ("full", 20), ("int8", 13), ("keep", 13), ("complexity", 13)]
)
async def test_answers_are_those_of_a_roomy_cache(tiny: TinyWorld, name: str, pages: int) -> None:
    policy = POLICIES[name]
    roomy, never = await served(tiny, asked(), policy, 4096)
    tight, often = await served(tiny, asked(), policy, 16 * pages)
    assert never == 0
    assert often >= 2
    assert tight == roomy


async def test_pressure_compresses_before_it_pre_empts_and_every_answer_is_complete(tiny: TinyWorld) -> None:
    policy = replace(POLICY, kv=replace(KEEP, kind="int4", when="pressure"))
    full, often = await served(tiny, asked(), POLICIES["full"], 16 * 20)
    compressed, seldom = await served(tiny, asked(), policy, 16 * 20)
    assert seldom < often
    assert [len(events) for events in compressed] == [len(events) for events in full]
    reports = [events[-1].ending.report for events in compressed if events[-1].ending is not None]
    assert any(chunk.kv for report in reports for chunk in report.chunks)

"""The evaluator does what the server does: the router's own loop, over the same engine, gives the same tokens at the
same ranks with the same pages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import pytest
import torch

from chunkwise.config.policy import SteeringPolicy
from chunkwise.config.settings import Limits, RouterSettings
from chunkwise.evaluation.driver import make_engine
from chunkwise.evaluation.jobs import Job
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.trace import Trace, Watcher
from chunkwise.model.llama import Llama, target_slices
from chunkwise.model.parallel import SingleProcess
from chunkwise.router.server import prepare
from chunkwise_adapters.format import load_adapter
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.store import AdapterStore
from conftest import TinyWorld
from evaluation.worlds import ADAPTIVE, FULL, evaluator
from in_process import EngineShards

PROMPTS = ("Stately, plump Buck Mulligan came from the stairhead", "oh oh oh oh oh oh oh oh", "Mrs. Dalloway said")
STEP_TOKENS = 32


async def serve(
    tiny: TinyWorld, jobs: Sequence[Job], policy: SteeringPolicy | None, *, one_by_one: bool
) -> list[tuple[tuple[int, ...], Trace]]:
    """Tokens and traces of the jobs from the router's loop, sent together or each after the one before."""
    cpu = torch.device("cpu")
    model = Llama(tiny.model, SingleProcess(), torch.float32, cpu)
    store = AdapterStore(target_slices(model.spec, model.plan), torch.float32, cpu)
    store.add(build_ladder(load_adapter(tiny.adapters["a16"], "a16", model.spec.target_shapes())))
    engine, decisions = make_engine(tiny.model, model, store, 2048)
    watcher = Watcher(engine.state)
    limits = Limits(max_batch_prefill_tokens=STEP_TOKENS)
    settings = RouterSettings("tiny", tiny.model, ("unix:///none",), limits=limits, policy=policy)
    serving = await prepare(settings, EngineShards(engine, decisions))
    engine.watch(watcher)
    task = asyncio.create_task(serving.loop.run())
    answers, served = [], []
    for job in jobs:
        answers.append(serving.loop.submit(job.request(0, "a16")))
        if one_by_one:
            served.append([event async for event in answers[-1]])
    if not one_by_one:
        served = [[event async for event in answer] for answer in answers]
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return [
        (tuple(event.token.id for event in events), watcher.take(answer.request_id))
        for answer, events in zip(answers, served, strict=True)
    ]


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("mode", [FULL, ADAPTIVE], ids=lambda mode: mode.name)
async def test_tokens_ranks_and_pages_are_the_router_s(tiny: TinyWorld, mode: SteeringMode, one_by_one: bool) -> None:
    jobs = [Job(str(i), tuple(text.encode()), max_new_tokens=40) for i, text in enumerate(PROMPTS)]
    expected = await serve(tiny, jobs, mode.policy, one_by_one=one_by_one)
    got = [(outcome.ids, outcome.trace) for outcome in evaluator(tiny, step_tokens=STEP_TOKENS).run(jobs, mode)]
    assert got == expected
    assert mode.policy is None or sum(len(trace.chunks) for _, trace in got) > 10

"""Ranks are what the steps computed, not what steering intended; KV bytes are what the pages took."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from chunkwise.evaluation.driver import Evaluator
from chunkwise.evaluation.jobs import Job
from chunkwise.evaluation.modes import BASE
from chunkwise.evaluation.trace import Trace, active_ranks
from chunkwise.model.llama import Llama
from chunkwise.model.step import StepInput
from chunkwise_adapters.store import ResidentAdapter, ResidentModule
from conftest import TinyWorld
from evaluation.worlds import ADAPTIVE, FULL, evaluator

PROMPTS = (
    b"Call me Ishmael. Some years ago",
    b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    b"It is a truth universally known",
)


@pytest.fixture(scope="module")
def stack(tiny: TinyWorld) -> Evaluator:
    return evaluator(tiny)


def jobs() -> list[Job]:
    return [Job(str(i), tuple(prompt), forced_ids=tuple(b"A whale, " * 4)) for i, prompt in enumerate(PROMPTS)]


def test_ranks_are_those_of_the_gates_that_each_step_applied(stack: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle reads the segments off the model's input, row by row; rows are told apart by their position alone, so
    each job runs by itself."""
    ranks: dict[int, float] = defaultdict(float)
    forward = Llama.forward

    def spy(self: Llama, step: StepInput, *rest: object) -> object:
        positions = step.positions.tolist()
        for position in positions:
            ranks[position] = 0.0
        for segment in step.segments:
            rows = range(len(positions))[segment.rows] if isinstance(segment.rows, slice) else segment.rows.tolist()
            for row in rows:
                ranks[positions[row]] = float(segment.adapter.rungs[segment.rung])
        return forward(self, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Llama, "forward", spy)
    seen = set()
    for job in jobs():
        ranks.clear()
        (outcome,) = stack.run([job], ADAPTIVE)
        assert outcome.trace.ranks() == [ranks[position] for position in range(outcome.trace.computed)]
        seen |= set(outcome.trace.ranks())
    assert len(seen) > 2, "the policy must use several rungs for this to show anything"


def test_a_cross_fade_costs_the_wider_of_its_two_rungs(stack: Evaluator) -> None:
    shown = 0
    for outcome in stack.run(jobs(), ADAPTIVE):
        ranks = outcome.trace.ranks()
        for before, chunk in zip(outcome.trace.chunks, outcome.trace.chunks[1:], strict=False):
            assert before.rung is not None and chunk.rung is not None
            if before.rung > chunk.rung:
                window = ranks[chunk.start : chunk.start + chunk.crossfade]
                assert window == [float(before.rung)] * len(window)
                shown += len(window)
    assert shown > 0


def test_the_rank_without_adapter_is_0_and_unsteered_the_trained_one(stack: Evaluator) -> None:
    for mode, rank in ((BASE, 0.0), (FULL, 16.0)):
        for outcome in stack.run(jobs(), mode):
            assert outcome.trace.rank_runs == ((outcome.trace.computed, rank),)
            assert outcome.trace.chunks == ()


def test_held_bytes_are_the_pages_of_the_sequence(stack: Evaluator) -> None:
    page = 2 * 4 * 16 * 3 * 8 * 4  # keys and values, layers, positions, heads, head_dim, fp32
    (outcome,) = stack.run([Job("x", tuple(b"p" * 20), forced_ids=tuple(b"q" * 20))], FULL)
    # Behind the prompt two pages; the third from position 32 on.
    held = [2 * page] * 13 + [3 * page] * 7
    assert (outcome.trace.kv_bytes_mean, outcome.trace.kv_bytes_peak) == (sum(held) / len(held), 3 * page)
    (small,) = stack.run([Job("x", tuple(b"p" * 60), forced_ids=tuple(b"q" * 60))], ADAPTIVE)
    (large,) = stack.run([Job("x", tuple(b"p" * 60), forced_ids=tuple(b"q" * 60))], FULL)
    assert small.trace.kv_bytes_mean < large.trace.kv_bytes_mean


def test_rank_sums_split_at_any_position() -> None:
    trace = Trace(((3, 2.0), (2, 8.0), (4, 0.5)), (), 0.0, 0, 0)
    assert trace.computed == 9
    for cut in range(12):
        assert trace.rank_sum(0, cut) == sum(trace.ranks()[:cut])
        assert trace.rank_sum(cut, 99) == sum(trace.ranks()[cut:])


def test_modules_weigh_by_their_size() -> None:
    """Rung 2 has a mean rank of 2 over the modules, but most of it sits in the larger one."""
    small = ResidentModule(torch.zeros(4, 10), torch.zeros(4, 10), (0, 1, 4))
    large = ResidentModule(torch.zeros(4, 10), torch.zeros(4, 70), (0, 3, 4))
    modules = {(0, "q_proj"): small, (0, "up_proj"): large}
    adapter = ResidentAdapter("x", "hash", 4, (0, 2, 4), (0.0, 0.5, 1.0), (0.0, 2.0, 4.0), modules)
    assert active_ranks(adapter) == pytest.approx((0.0, (1 * 20 + 3 * 80) / 100, 4.0))

"""The runners that need no other environment: PEFT on the tiny model, and what ours reads off /metrics."""

from __future__ import annotations

import pytest

from chunkwise.bench.runners.peft import Engine
from chunkwise.bench.runners.protocol import StartOrder, StreamOrder
from chunkwise.bench.runners.server import answer_rank, parse_steps
from chunkwise.core import StepResult
from chunkwise.router.metrics import Metrics
from conftest import TinyWorld

PROMPTS = [[5, 6, 7, 8], [9, 8, 7, 6], [1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def peft(tiny: TinyWorld) -> Engine:
    engine = Engine()
    adapters = {name: str(path) for name, path in tiny.adapters.items()}
    engine.start(StartOrder(str(tiny.model), adapters, 1, "float32", 4, 16, []))
    return engine


def orders(*adapters: str | None) -> list[StreamOrder]:
    return [StreamOrder("", ids, name, 6) for ids, name in zip(PROMPTS, adapters, strict=False)]


@pytest.mark.filterwarnings("ignore")
def test_a_mixed_batch_gives_what_each_stream_gives_alone(peft: Engine) -> None:
    mixed = peft.run(orders("a4", None, "a16", "a8"))
    assert mixed.groups == [[0, 1, 2, 3]]
    for order, stream in zip(orders("a4", None, "a16", "a8"), mixed.streams, strict=True):
        (alone,) = peft.run([order]).streams
        assert stream.ids == alone.ids
        assert len(stream.times_ms) == 6
        assert stream.times_ms == sorted(stream.times_ms)


@pytest.mark.filterwarnings("ignore")
def test_adapters_differ_from_the_base_and_leave_nothing_behind(peft: Engine) -> None:
    (base,) = peft.run(orders(None)).streams
    (adapted,) = peft.run(orders("a4")).streams
    (again,) = peft.run(orders(None)).streams
    assert base.ids == again.ids
    assert base.ids != adapted.ids


def test_streams_that_transformers_cannot_batch_are_refused(peft: Engine) -> None:
    with pytest.raises(ValueError, match="continuous batching"):
        peft.run([StreamOrder("", [1, 2], None, 3), StreamOrder("", [1, 2, 3], None, 3)])


def test_step_times_are_read_off_the_metrics() -> None:
    metrics = Metrics(max_total_tokens=64)
    for milliseconds in (10, 30):
        result = StepResult(generations=(), batch=None, forward_ns=milliseconds * 1_000_000, decode_ns=0, total_ns=0)
        metrics.step_done("decode", 2 * milliseconds / 1000, result)
    steps = parse_steps(metrics.render().decode())
    assert steps["forward_decode"] == pytest.approx((0.040, 2))
    assert steps["batch_decode"] == pytest.approx((0.080, 2))


def test_the_rank_of_an_answer_leaves_the_prompt_out() -> None:
    """Ten tokens of prompt; the second chunk begins in it, and gives the answer two positions at 8 and six at 16."""
    chunks = [(0, 6, 32.0), (6, 12, 8.0), (12, 18, 16.0)]
    details = {"input_length": 10, "chunks": [{"start": s, "end": e, "rank": r} for s, e, r in chunks]}
    assert answer_rank(details) == (2 * 8 + 6 * 16) / 8
    assert answer_rank(details | {"chunks": []}) is None

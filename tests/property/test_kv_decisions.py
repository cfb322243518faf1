"""A KV decision with a position takes effect there: whatever else is in the batch and however the prompt is cut, and
again when what was generated is read as a prompt. To the bit, on the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkwise.core import ChunkDecision, KvDecision, KvFormat, KvScorer, SteeringUpdate
from chunkwise.kv.cache import plan_gather
from chunkwise.shard.sequence import Sequence
from conftest import TinyWorld
from serving import CPU, Driver, request

NEW = 24


@pytest.fixture(scope="module")
def drivers(tiny: TinyWorld) -> dict[int, Driver]:
    """By the most tokens of a step."""
    return {
        budget: Driver(tiny.model, tiny.adapters, prefill_tokens=budget, prefix_caching=budget == 256)
        for budget in (256, 50, 7)
    }


@st.composite
def decisions(draw: st.DrawFn, tokens: int) -> tuple[KvDecision, ...]:
    """Chunks that tile a text of ``tokens`` tokens, some of them asked for again."""
    made: list[KvDecision] = []
    start = draw(st.integers(0, 20))
    while start < tokens:
        end = start + draw(st.integers(5, 60))
        kind = draw(st.sampled_from(list(KvFormat)))
        drop = draw(st.sampled_from([0, 0, 34, 50, 100]))
        effective = end + draw(st.integers(0, 30))
        first = KvDecision(1, start, end, kind, drop, draw(st.sampled_from(list(KvScorer))), effective)
        made.append(first)
        if kind is not KvFormat.INT4 and draw(st.booleans()):
            made.append(replace(first, format=KvFormat.INT4, effective=effective + draw(st.integers(0, 20))))
        start = end
    return tuple(made)


class Recorder:
    """Keys and values of one request at every number of computed positions."""

    def __init__(self, driver: Driver, id: int) -> None:
        self.kept: dict[int, torch.Tensor] = {}
        self._driver, self._id = driver, id
        driver.engine.watch(self._observe)

    def _observe(self, sequences: SequenceOf[Sequence]) -> None:
        cache = self._driver.engine._require_runner().cache
        for sequence in sequences:
            if sequence.request.id == self._id and sequence.pages:
                plan, slots = plan_gather(sequence.pages, CPU), sequence.slot(sequence.computed)
                layers = [torch.stack(cache.gather(layer, plan)) for layer in range(cache.shape.layers)]
                self.kept[sequence.computed] = torch.stack(layers)[:, :, :slots].clone()


def _run(
    driver: Driver,
    prompt: tuple[int, ...],
    new: int,
    kv: tuple[KvDecision, ...],
    adapter: str | None,
    others: int = 0,
    chunk_len: int | None = None,
) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The tokens of request 1, and its keys and values by positions computed; ``others`` run beside it."""
    driver.restart_steering()
    driver.tokens.clear()
    recorder = Recorder(driver, 1)
    chunks = (ChunkDecision(1, 0, 2), ChunkDecision(1, 60, 1, crossfade=5)) if adapter else ()
    driver.steer(SteeringUpdate(1, chunks=chunks, kv=kv))
    company = [
        request(10 + i, "z" * (20 + 30 * i), new=5 * i + 1, adapter_id=("a4", None)[i % 2]) for i in range(others)
    ]
    batch = driver.prefill(company, seq=1).batch if company else None
    wanted = request(1, prompt_ids=prompt, new=new, adapter_id=adapter, chunk_len=chunk_len)
    result = driver.prefill([wanted], batch, seq=1)
    while result.batch is not None:
        result = driver.decode(result.batch, seq=1)
    assert not driver.errors
    return driver.tokens[1], recorder.kept


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_neither_cuts_nor_company_change_what_a_token_sees(drivers: dict[int, Driver], data: st.DataObject) -> None:
    length = data.draw(st.integers(20, 160))
    prompt = tuple(data.draw(st.lists(st.integers(0, 255), min_size=length, max_size=length)))
    kv, adapter = data.draw(decisions(length + NEW)), data.draw(st.sampled_from([None, "a8"]))
    tokens, kept = _run(drivers[256], prompt, NEW, kv, adapter)
    for budget, driver in drivers.items():
        chunk_len, others = data.draw(st.none() | st.integers(1, 60)), data.draw(st.integers(0, 3))
        again, also_kept = _run(driver, prompt, NEW, kv, adapter, others, chunk_len)
        assert again == tokens, budget
        for computed in kept.keys() & also_kept.keys():
            assert torch.equal(kept[computed], also_kept[computed])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_generation_that_is_read_again_as_a_prompt_goes_on_alike(
    drivers: dict[int, Driver], data: st.DataObject
) -> None:
    """What a router does with a request that it pre-empted."""
    length = data.draw(st.integers(20, 120))
    prompt = tuple(data.draw(st.lists(st.integers(0, 255), min_size=length, max_size=length)))
    kv, adapter = data.draw(decisions(length + NEW)), data.draw(st.sampled_from([None, "a4"]))
    tokens, kept = _run(drivers[50], prompt, NEW, kv, adapter)
    done = data.draw(st.integers(1, NEW - 1))
    for budget in (256, 7):
        rest, also_kept = _run(drivers[budget], (*prompt, *tokens[:done]), NEW - done, kv, adapter)
        assert rest == tokens[done:]
        common = kept.keys() & also_kept.keys()
        assert length + done in common
        assert all(torch.equal(kept[computed], also_kept[computed]) for computed in common)

"""A request that is interrupted and resumed goes on as if nothing had happened: same tokens, texts and logprobs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from chunkwise.core import (
    ChunkDecision,
    Generation,
    GenerationRequest,
    Grammar,
    KvDecision,
    KvFormat,
    KvScorer,
    SamplingParams,
    SteeringUpdate,
    StepResult,
    StoppingParams,
)
from conftest import TinyWorld
from serving import Driver, request

NEW = 24
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune."
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}, "required": ["n"]}'
KINDS: dict[str, GenerationRequest] = {
    "greedy": request(1, TEXT, NEW),
    "adapter": request(1, TEXT, NEW, adapter_id="a8"),
    "sampled": request(1, TEXT, NEW, sampling=SamplingParams(temperature=1.3, top_p=0.9, seed=11), adapter_id="a4"),
    "typical": request(1, TEXT, NEW, sampling=SamplingParams(do_sample=True, typical_p=0.8, top_k=50, seed=5)),
    "penalised": request(
        1, TEXT, NEW, sampling=SamplingParams(repetition_penalty=1.4, frequency_penalty=0.7, do_sample=True)
    ),
    "marked": request(1, TEXT, NEW, sampling=SamplingParams(watermark=True)),
    "regex": request(1, TEXT, NEW, sampling=SamplingParams(grammar=Grammar("regex", "[a-f]{5,9}(x|yz)+"))),
    "json": request(1, TEXT, NEW, sampling=SamplingParams(grammar=Grammar("json", SCHEMA), do_sample=True, seed=3)),
    "top": request(1, TEXT, NEW, top_n_tokens=3),
    "stopped": request(1, TEXT, stopping=StoppingParams(NEW, ("\n", "e", "th", "q"), ignore_eos=True)),
    "forced": request(1, TEXT, NEW, forced_ids=tuple(range(65, 65 + NEW))),
}


@dataclass
class Recorder:
    """Runs steps and keeps what each request got."""

    driver: Driver
    got: dict[int, list[Generation]] = field(default_factory=dict)

    def take(self, result: StepResult) -> StepResult:
        for generation in result.generations:
            self.got.setdefault(generation.request_id, []).append(generation)
        return result

    def ids(self, request_id: int) -> tuple[int, ...]:
        return tuple(generation.token.id for generation in self.got.get(request_id, ()))

    def run(self, *requests: GenerationRequest, seq: int = 0) -> None:
        result = self.take(self.driver.prefill(requests, seq=seq))
        while result.batch is not None:
            result = self.take(self.driver.decode(result.batch, seq=seq))

    def interrupt(self, wanted: GenerationRequest, after: int, seq: int = 0, again: int = 0) -> None:
        """Takes a request out of its batch after so many steps, and lets it in again when the others have gone on; at
        ``again`` the shard is told its decisions anew."""
        other = request(2, "Call me Ishmael.", 60)
        result = self.take(self.driver.prefill([other, wanted], seq=seq))
        for _ in range(after - 1):
            assert result.batch is not None
            result = self.take(self.driver.decode(result.batch, seq=seq))
        assert result.batch is not None
        kept = self.driver.engine.filter_batch(result.batch.id, [2], seq)
        self.driver.engine.check_integrity()
        result = self.take(self.driver.decode(kept, seq=seq))
        assert result.batch is not None
        resumed = replace(wanted, resumed_ids=self.ids(1), chunk_len=None)
        result = self.take(self.driver.prefill([resumed], result.batch, seq=again))
        while result.batch is not None:
            result = self.take(self.driver.decode(result.batch, seq=again))


@pytest.fixture(scope="module")
def driver(tiny: TinyWorld) -> Driver:
    return Driver(tiny.model, tiny.adapters, prefill_tokens=64)


@pytest.fixture(autouse=True)
def _nothing_is_left(driver: Driver):
    driver.restart_steering()
    yield
    driver.engine.clear_cache(None)
    driver.engine.check_integrity()
    assert driver.engine.state().sequences == 0


@pytest.mark.parametrize("after", [1, 2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_texts_and_logprobs_are_those_without_the_interruption(driver: Driver, kind: str, after: int) -> None:
    """The prompt has 89 tokens and a step computes 64, so after one step there is nothing to resume but the prompt."""
    wanted = KINDS[kind]
    whole, interrupted = Recorder(driver), Recorder(driver)
    whole.run(wanted)
    interrupted.interrupt(wanted, after)
    assert interrupted.got[1] == whole.got[1]
    assert interrupted.got[1][-1].text is not None
    assert len(whole.ids(1)) > 8 or kind == "stopped"


def test_ranks_of_prompt_and_answer_are_those_without_the_interruption(driver: Driver) -> None:
    chunks = tuple(
        ChunkDecision(1, start, rung, crossfade=2) for start, rung in ((0, 2), (40, 16), (70, 1), (92, 8), (97, 4))
    )
    wanted = replace(KINDS["greedy"], adapter_id="a16")
    whole, interrupted = Recorder(driver), Recorder(driver)
    driver.steer(SteeringUpdate(1, chunks))
    whole.run(wanted, seq=1)
    driver.steer(SteeringUpdate(2, chunks))
    driver.steer(SteeringUpdate(3, chunks))
    interrupted.interrupt(wanted, 10, seq=2, again=3)
    assert interrupted.got[1] == whole.got[1]
    plain = Recorder(driver)
    plain.run(wanted)
    assert plain.got[1] != whole.got[1]


@pytest.mark.parametrize("after", [2, 3, 14, 22])
def test_compressed_pages_are_those_without_the_interruption(driver: Driver, after: int) -> None:
    """Rewritten inside the prompt of 89 tokens, where the answer begins, and inside the answer, before and after the
    interruption; the first step computes up to position 48."""
    kv = (
        KvDecision(1, 16, 32, KvFormat.INT8, effective=48),
        KvDecision(1, 32, 64, KvFormat.INT4, 50, KvScorer.KEY_DIVERSITY, effective=80),
        KvDecision(1, 64, 80, KvFormat.FULL, 100, effective=89),
        KvDecision(1, 80, 96, KvFormat.INT4, effective=105),
    )
    wanted = replace(KINDS["sampled"], adapter_id="a16", stopping=StoppingParams(30, ignore_eos=True))
    whole, interrupted, full = Recorder(driver), Recorder(driver), Recorder(driver)
    driver.steer(SteeringUpdate(1, kv=kv))
    whole.run(wanted, seq=1)
    driver.steer(SteeringUpdate(2, kv=kv[: 4 if after > 10 else 3]))
    driver.steer(SteeringUpdate(3, kv=kv))
    interrupted.interrupt(wanted, after, seq=2, again=3)
    assert interrupted.got[1] == whole.got[1]
    full.run(wanted)
    assert full.got[1] != whole.got[1]


def test_a_resumed_request_that_has_nothing_left_to_generate_is_refused(driver: Driver) -> None:
    driver.prefill([request(1, new=2, resumed_ids=(65, 66)), request(2, new=2, resumed_ids=(999,))])
    assert "2 tokens are resumed but max_new_tokens is 2" in driver.errors[1]
    assert "resumed id 999 is beyond the vocabulary" in driver.errors[2]


def test_the_state_tells_what_compression_saved_and_what_gave_way(tiny: TinyWorld) -> None:
    driver = Driver(tiny.model, total_tokens=12 * 16, prefill_tokens=128)
    page = driver.engine.state().kv_bytes_budget // 12
    kv = (KvDecision(1, 16, 48, KvFormat.INT8, effective=64), KvDecision(1, 48, 64, KvFormat.FULL, 100, effective=80))
    driver.steer(SteeringUpdate(1, kv=kv))
    recorder = Recorder(driver)
    batch = recorder.take(driver.prefill([request(1, "x" * 100, 3)], seq=1)).batch
    while batch is not None and not recorder.got:
        batch = recorder.take(driver.decode(batch, seq=1)).batch
    state = driver.engine.state()
    held = sum(usage.bytes for usage in state.kv)
    assert state.kv_full_bytes == 7 * page
    assert 4 * page < held < 5 * page, "four full ones, two in 8 bits, one gone"
    kept = sum(usage.idle for usage in state.kv)
    assert state.kv_free_pages == (12 * page - held - kept * page) // page
    while batch is not None:
        batch = recorder.take(driver.decode(batch, seq=1)).batch
    ending = recorder.got[1][-1].text
    assert ending is not None
    assert (ending.kv_bytes, ending.kv_full_bytes) == (held, 7 * page)
    assert driver.engine.state().kv_full_bytes == 0
    driver.run(request(2, "y" * 170, 2))
    assert driver.engine.state().kv_evicted_pages > 0


def test_free_pages_tell_what_the_known_tokens_leave(driver: Driver) -> None:
    """A token more is known than computed, so a page counts from the step on that chose its first token."""
    total = driver.limits.max_supported_total_tokens // 16
    result = driver.prefill([request(1, "x" * 30, 20)])
    free = []
    while result.batch is not None:
        free.append(result.batch.free_pages)
        result = driver.decode(result.batch)
    assert free == [total - 2] * 2 + [total - 3] * 16 + [total - 4]
    long = driver.prefill([request(1, "y" * 200, 2)]).batch
    assert long is not None
    assert long.free_pages == total - 13, "also those pages that its later steps need"
    driver.engine.clear_cache(None)
    again = driver.prefill([request(3, "y" * 200, 2)]).batch
    assert again is not None
    assert again.free_pages == total - 13, "pages of an earlier prompt give way, or are its own"

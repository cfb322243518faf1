"""What each generate.v3 call does to the live batches: equivalences, isolation of failures, memory that comes back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from chunkwise.core import (
    CachedBatch,
    ChunkDecision,
    FinishReason,
    GenerationFailed,
    Grammar,
    InvalidRequest,
    KvDecision,
    KvFormat,
    SamplingParams,
    SteeringUpdate,
    SteeringViolation,
    StoppingParams,
)
from conftest import TinyWorld
from serving import Driver, request

MakeDriver = Callable[..., Driver]


@pytest.fixture(scope="module")
def driver(tiny: TinyWorld) -> Driver:
    return Driver(tiny.model, tiny.adapters)


@pytest.fixture(autouse=True)
def _nothing_is_left(driver: Driver):
    """After every test the shard holds nothing."""
    driver.restart_steering()
    driver.tokens.clear()
    driver.texts.clear()
    driver.errors.clear()
    yield
    driver.engine.clear_cache(None)
    driver.engine.check_integrity()
    state = driver.engine.state()
    assert state.sequences == 0
    assert all(usage.pages == 0 and usage.bytes == 0 for usage in state.kv)


def test_number_of_tokens_and_the_end(driver: Driver) -> None:
    result = driver.prefill([request(7, new=3)])
    assert [len(driver.tokens[7]), result.batch and result.batch.request_ids] == [1, (7,)]
    result = driver.decode(result.batch)
    result = driver.decode(result.batch)
    (generation,) = result.generations
    assert result.batch is None
    assert generation.text is not None
    assert generation.text.generated_tokens == 3
    assert generation.text.finish_reason is FinishReason.LENGTH


def test_one_token_is_finished_in_prefill_and_nothing_is_cached(driver: Driver) -> None:
    result = driver.prefill([request(1, new=1)])
    assert result.batch is None
    assert result.generations[0].text is not None


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_joining_filtering_and_finishing_in_any_order_equals_alone(driver: Driver, data: st.DataObject) -> None:
    adapters = [None, "a4", "a8", "a16"]
    wanted = [
        request(
            id,
            "x" * data.draw(st.integers(1, 40)) + str(id),
            new=data.draw(st.integers(1, 12)),
            adapter_id=data.draw(st.sampled_from(adapters)),
            chunk_len=data.draw(st.none() | st.integers(1, 20)),
        )
        for id in range(4)
    ]
    driver.tokens.clear()
    alone = {r.id: driver.run(r)[r.id] for r in wanted}
    driver.tokens.clear()
    waiting, batches, dropped = list(wanted), [], set()
    while waiting or batches:
        if waiting and (not batches or data.draw(st.booleans())):
            cached = batches.pop() if batches and data.draw(st.booleans()) else None
            batch = driver.prefill([waiting.pop()], cached).batch
        elif len(batches) == 1 and len(batches[0].request_ids) > 1 and data.draw(st.integers(0, 5)) == 0:
            drop = data.draw(st.sampled_from(batches[0].request_ids))
            dropped.add(drop)
            keep = [id for id in batches[0].request_ids if id != drop]
            batch = driver.engine.filter_batch(batches.pop().id, keep, 0)
        else:
            batch = driver.decode(*batches).batch
            batches = []
        if batch is not None:
            batches.append(batch)
    for r in wanted:
        got = driver.tokens.get(r.id, [])
        assert got == (alone[r.id][: len(got)] if r.id in dropped else alone[r.id])


def test_prompt_over_the_step_budget_is_computed_in_pieces(tiny: TinyWorld) -> None:
    text = "a prompt that is longer than one step may compute " * 3
    whole = Driver(tiny.model).run(request(1, text))
    pieces = Driver(tiny.model, prefill_tokens=40)
    result = pieces.prefill([request(1, text)])
    assert result.generations == ()
    assert result.batch is not None
    assert result.batch.current_tokens == 40
    while result.batch is not None:
        result = pieces.decode(result.batch)
    assert pieces.tokens == whole


def test_bad_requests_end_alone(driver: Driver) -> None:
    good = driver.run(request(1, adapter_id="a4"))[1]
    driver.tokens.clear()
    bad = [
        request(2, adapter_id="nobody"),
        request(3, "x" * 2000),
        request(4, new=0),
        request(5, prompt_ids=(5, 9999)),
        request(6, ""),
        request(7, sampling=SamplingParams(grammar=Grammar("regex", "("))),
        request(8, new=2**31),
    ]
    got = driver.run(*bad[:3], request(1, adapter_id="a4"), *bad[3:])
    assert got[1] == good
    assert set(driver.errors) == {2, 3, 4, 5, 6, 7, 8}
    assert "nobody" in driver.errors[2]
    assert "['a16', 'a4', 'a8']" in driver.errors[2]
    assert "2000" in driver.errors[3]
    assert "9999" in driver.errors[5]
    assert "unclosed group" in driver.errors[7]


def test_an_error_is_an_ordinary_end_for_a_peer_that_ignores_it(driver: Driver) -> None:
    (generation,) = driver.prefill([request(2, adapter_id="nobody")]).generations
    assert generation.error is not None
    assert generation.error.kind == "validation"
    assert generation.text is not None
    assert generation.text.generated_tokens == 1


def test_running_out_of_pages_ends_only_who_needed_more(tiny: TinyWorld) -> None:
    driver = Driver(tiny.model, total_tokens=64)
    alone = driver.run(request(1, "a prompt of two pages", new=8))[1]
    driver.tokens.clear()
    got = driver.run(request(1, "a prompt of two pages", new=8), request(2, "y" * 45, new=3))
    assert got[1] == alone
    assert "max-batch-total-tokens" in driver.errors[2]
    driver.engine.check_integrity()
    assert driver.engine.state().sequences == 0


def test_broken_weights_end_their_request_and_leave_no_trace(tiny: TinyWorld, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.adapters["a4"].iterdir():
        if file.suffix == ".safetensors":
            huge = {k: v * 1e18 for k, v in load_file(file).items()}
            save_file(huge, broken / file.name)
        elif file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    driver = Driver(tiny.model, {"broken": broken})
    alone = driver.run(request(1))[1]
    driver.tokens.clear()
    batch = driver.prefill([request(1), request(2, adapter_id="broken")]).batch
    assert "broken" in driver.errors[2]
    # The next request takes over the pages that held NaN.
    result = driver.prefill([request(3, "Hello there, General.")], batch)
    while result.batch is not None:
        result = driver.decode(result.batch)
    assert driver.tokens[1] == driver.tokens[3] == alone


def test_unknown_and_missing_batches_are_refused_and_serving_goes_on(driver: Driver) -> None:
    batch = driver.prefill([request(1, new=4)]).batch
    ghost = CachedBatch(999, (1,), 0, 0)
    with pytest.raises(InvalidRequest, match="999"):
        driver.decode(batch, ghost)
    with pytest.raises(InvalidRequest, match="at least one"):
        driver.decode()
    with pytest.raises(InvalidRequest, match="999"):
        driver.engine.filter_batch(999, [1], 0)
    driver.engine.clear_cache(999)
    while batch is not None:
        batch = driver.decode(batch).batch
    assert len(driver.tokens[1]) == 4


def test_same_seed_gives_the_same_text_in_any_company(driver: Driver) -> None:
    sampling = SamplingParams(temperature=0.9, top_k=40, top_p=0.9, do_sample=True, seed=2**63 + 11)
    alone = driver.run(request(1, new=12, sampling=sampling))[1]
    driver.tokens.clear()
    batch = driver.prefill([request(2, "another", sampling=SamplingParams(do_sample=True, seed=1), new=20)]).batch
    result = driver.prefill([request(1, new=12, sampling=sampling)], batch)
    while result.batch is not None:
        result = driver.decode(result.batch)
    assert driver.tokens[1] == alone
    assert len(set(alone)) > 3


def test_stop_sequence_split_over_tokens_is_found(driver: Driver) -> None:
    """One byte is one token here, so every stop string of several letters is split."""
    for prompt in ("one", "two", "three", "four", "five", "six"):
        free = driver.run(request(1, prompt, new=40))[1]
        text = driver.texts[1]
        found = re.search(r"[!-~]{3}", text)
        if found:
            stop = found.group()
            got = driver.run(request(2, prompt, stopping=StoppingParams(40, ("never", stop), ignore_eos=True)))[2]
            assert driver.texts[2] == text[: found.end()]
            assert got == free[: len(got)]
            return
        driver.tokens.clear()
    pytest.fail("no answer held three printable letters")


def test_a_decode_sent_ahead_passes_over_what_has_ended(driver: Driver) -> None:
    """Its steering updates count all the same, and its signals come, since somebody waits for them."""
    ends, goes_on = driver.prefill([request(1, new=1)]), driver.prefill([request(2, new=3)])
    assert ends.batch is None
    assert goes_on.batch is not None
    driver.steer(SteeringUpdate(1, released=(1,)))
    result, signals = driver.engine.decode([1], 1, 7, may_have_ended=True)
    assert (result.generations, result.batch, signals.step, signals.signals) == ((), None, 7, ())
    result, _ = driver.engine.decode([1, goes_on.batch.id], 1, 8, may_have_ended=True)
    assert [generation.request_id for generation in result.generations] == [2]
    assert result.batch is not None
    assert result.batch.id == goes_on.batch.id
    with pytest.raises(InvalidRequest, match="not cached"):
        driver.engine.decode([1], 1, 9)


def test_end_of_sequence_is_reported_and_left_out_of_the_text(driver: Driver) -> None:
    """The tiny model is random, so end-of-sequence is forced by a repetition penalty's opposite: search a prompt."""
    for seed in range(200):
        sampling = SamplingParams(do_sample=True, temperature=3.0, seed=seed)
        result = driver.prefill([request(seed, "z", sampling=sampling, stopping=StoppingParams(60))])
        while result.batch is not None:
            result = driver.decode(result.batch)
        (last,) = result.generations
        if last.text is not None and last.text.finish_reason is FinishReason.EOS_TOKEN:
            assert last.token.special
            # Random bytes may come before it that do not end a character.
            assert last.token.text.endswith("<eos>")
            assert "<eos>" not in last.text.text
            assert last.text.seed == seed
            return
    pytest.fail("no sample ended")


def test_decisions_change_the_answer_and_rung_full_does_not(driver: Driver) -> None:
    full = driver.run(request(1, adapter_id="a16", new=16))[1]
    base = driver.run(request(2, new=16))[2]
    assert full != base
    updates = [
        SteeringUpdate(1, chunks=(ChunkDecision(3, 0, rung=16), ChunkDecision(3, 30, rung=16, crossfade=4))),
        SteeringUpdate(2, chunks=(ChunkDecision(4, 0, rung=0),)),
        SteeringUpdate(3, chunks=(ChunkDecision(5, 0, rung=1), ChunkDecision(5, 24, rung=8, crossfade=4))),
    ]
    for update in updates:
        driver.steer(update)
    got = driver.run(*(request(id, adapter_id="a16", new=16) for id in (3, 4, 5)), seq=3)
    assert got[3] == full
    assert got[4] == base
    assert got[5] not in (full, base)
    assert len(driver.decisions) == 0


def test_a_late_decision_and_an_unknown_rung_end_their_request_alone(driver: Driver) -> None:
    full = driver.run(request(1, adapter_id="a4"))[1]
    driver.tokens.clear()
    driver.steer(SteeringUpdate(1, chunks=(ChunkDecision(3, 0, rung=7),)))
    driver.steer(SteeringUpdate(2, chunks=(ChunkDecision(2, 5, rung=1),)))
    batch = driver.prefill([request(id, adapter_id="a4") for id in (1, 2, 3)], seq=1).batch
    assert "rung 7" in driver.errors[3]
    while batch is not None:
        batch = driver.decode(batch, seq=2).batch
    assert "position 5" in driver.errors[2]
    assert driver.tokens[1] == full


def test_kv_decisions_return_pages_and_keep_the_answer_close(driver: Driver) -> None:
    text = "the quick brown fox jumps over the lazy dog, and again. " * 3
    plain = driver.run(request(1, text, new=10))[1]
    batch = driver.prefill([request(2, text, new=10)]).batch
    before = {usage.format: usage for usage in driver.engine.state().kv}
    driver.steer(SteeringUpdate(1, kv=(KvDecision(2, 16, 70, KvFormat.INT8),)))
    driver.steer(SteeringUpdate(2, kv=(KvDecision(2, 70, 128, KvFormat.INT8),)))
    batch = driver.decode(batch, seq=1).batch
    first = {usage.format: usage for usage in driver.engine.state().kv}
    assert first[KvFormat.INT8].pages == 3
    batch = driver.decode(batch, seq=2).batch
    after = {usage.format: usage for usage in driver.engine.state().kv}
    assert after[KvFormat.INT8].pages == 7, "the page that two chunks share follows once both are decided"
    assert after[KvFormat.FULL].pages == before[KvFormat.FULL].pages - 7
    assert sum(u.bytes for u in after.values()) < 0.6 * sum(u.bytes for u in before.values())
    while batch is not None:
        batch = driver.decode(batch, seq=2).batch
    same = sum(a == b for a, b in zip(plain, driver.tokens[2], strict=True))
    assert same >= 8, "eight bits disturb a few near ties at most"


def test_a_missing_update_fails_the_step_and_not_the_server(driver: Driver) -> None:
    with pytest.raises(GenerationFailed, match="did not arrive"):
        driver.prefill([request(1)], seq=1)
    driver.steer(SteeringUpdate(1))
    assert driver.prefill([request(1, new=1)], seq=1).batch is None


def test_warmup_limits(tiny: TinyWorld, driver: Driver) -> None:
    limits = driver.limits
    assert limits.max_total_tokens == 512
    assert limits.max_input_tokens == 511
    assert limits.max_supported_total_tokens >= limits.max_total_tokens + 16
    fresh = Driver(tiny.model, total_tokens=256)
    with pytest.raises(InvalidRequest, match="max_total_tokens is 300"):
        fresh.engine.warmup([], 64, None, 300)
    with pytest.raises(InvalidRequest, match="max_input_tokens is 100"):
        fresh.engine.warmup([], 64, 100, 100)
    assert fresh.engine.warmup([request(0, "x", new=2**32 - 1)], 64, 50, 100).max_input_tokens == 50


def test_half_precision_serves(tiny: TinyWorld) -> None:
    driver = Driver(tiny.model, tiny.adapters, dtype=torch.bfloat16)
    assert len(driver.run(request(1, adapter_id="a8"))[1]) == 8


def _reused(driver: Driver) -> int:
    return driver.engine.state().reused_tokens


def test_a_prompt_seen_before_is_reused_and_answers_the_same(tiny: TinyWorld) -> None:
    cached, fresh = Driver(tiny.model, tiny.adapters), Driver(tiny.model, tiny.adapters, prefix_caching=False)
    head = "a long shared beginning that fills several pages of the cache, "
    for id, (tail, adapter) in enumerate([("one", "a4"), ("two", "a4"), ("two", "a8"), ("two", None), ("two", "a4")]):
        before = _reused(cached)
        wanted = request(id, head + tail, adapter_id=adapter)
        assert cached.run(wanted) == fresh.run(wanted)
        full_pages = len(head) // 16 * 16
        assert _reused(cached) - before == {0: 0, 1: full_pages, 2: 0, 3: 0, 4: 64}[id]
    assert _reused(fresh) == 0


def test_a_finished_conversation_is_reused_by_its_continuation(driver: Driver) -> None:
    ids = driver.run(request(1, "x" * 40, new=30))[1]
    prompt = driver.engine._tokenizer.encode("x" * 40)
    before = _reused(driver)
    longer = request(2, "", new=4, prompt_ids=(*prompt, *ids, 5, 6))
    got = driver.run(longer)
    assert _reused(driver) - before == 64
    assert got == driver.run(longer)


def test_pages_computed_under_other_ranks_are_not_reused(driver: Driver) -> None:
    text = "ranks are part of what a page depends on, as much as its tokens are"
    plan = {
        1: (ChunkDecision(1, 0, rung=2),),
        2: (ChunkDecision(2, 0, rung=2), ChunkDecision(2, 32, rung=8, crossfade=4)),
        3: (ChunkDecision(3, 0, rung=2, scale=0.5),),
        4: (ChunkDecision(4, 0, rung=2), ChunkDecision(4, 32, rung=8, crossfade=4)),
    }
    reused = []
    for id, chunks in plan.items():
        driver.steer(SteeringUpdate(id, chunks=chunks))
        before = _reused(driver)
        driver.run(request(id, text, adapter_id="a8"), seq=id)
        reused.append(_reused(driver) - before)
    assert reused == [0, 32, 0, 64]


def test_compressed_pages_and_what_follows_them_are_not_offered(driver: Driver) -> None:
    text = "compression changes what later tokens see, so it ends sharing here."
    batch = driver.prefill([request(1, text, new=40)]).batch
    driver.steer(SteeringUpdate(1, kv=(KvDecision(1, 0, 48, KvFormat.INT8),)))
    while batch is not None:
        batch = driver.decode(batch, seq=1).batch
    prompt = driver.engine._tokenizer.encode(text)
    before = _reused(driver)
    driver.run(request(2, "", prompt_ids=(*prompt, *driver.tokens[1])))
    assert _reused(driver) - before == 64, "the four full prompt pages, and nothing computed after compression"


def test_idle_pages_give_way_to_requests(tiny: TinyWorld) -> None:
    driver = Driver(tiny.model, total_tokens=256)
    for id in range(8):
        driver.run(request(id, chr(97 + id) * 100, new=20))
    assert not driver.errors
    state = {usage.format: usage for usage in driver.engine.state().kv}
    assert state[KvFormat.FULL].pages == 0
    assert 0 < state[KvFormat.FULL].idle <= 16


def test_prompt_logprobs_equal_transformers_whole_and_in_pieces(tiny: TinyWorld) -> None:
    from transformers import LlamaForCausalLM

    text = "the log-probability of every prompt token, given those before it"
    model = LlamaForCausalLM.from_pretrained(tiny.model).eval()
    for prefill_tokens in (256, 20):
        driver = Driver(tiny.model, prefill_tokens=prefill_tokens, prefill_logprobs=True)
        for id in (1, 2):
            result = driver.prefill([request(id, text, prefill_logprobs=True, new=2)])
            while not result.generations:
                result = driver.decode(result.batch)
            prefill = result.generations[0].prefill_tokens
            ids = torch.tensor([[token.id for token in prefill]])
            assert ids[0].tolist() == driver.engine._tokenizer.encode(text)
            with torch.inference_mode():
                expected = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            assert math.isnan(prefill[0].logprob)
            got = torch.tensor([token.logprob for token in prefill[1:]])
            torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
            assert driver.decode(result.batch).generations[0].prefill_tokens == ()


def test_prompt_logprobs_are_ignored_unless_the_server_enables_them(driver: Driver) -> None:
    (generation,) = driver.prefill([request(1, prefill_logprobs=True, new=1)]).generations
    assert generation.prefill_tokens == ()


def test_overlapping_kv_decisions_end_their_request_alone(driver: Driver) -> None:
    text = "pages must not be compressed twice, whatever a router may send down its stream"
    batch = driver.prefill([request(1, text), request(2, text)]).batch
    kv = (KvDecision(2, 0, 32, KvFormat.INT8), KvDecision(2, 16, 48, KvFormat.INT8))
    driver.steer(SteeringUpdate(1, kv=kv))
    while batch is not None:
        batch = driver.decode(batch, seq=1).batch
    assert "without overlap" in driver.errors[2]
    assert len(driver.tokens[1]) == 8


def test_a_new_steering_session_leaves_live_requests_as_they_are(driver: Driver) -> None:
    """A router that reconnects must not change, half-way, what a running request computes."""
    base = driver.run(request(1, new=12))[1]
    driver.steer(SteeringUpdate(1, chunks=(ChunkDecision(2, 0, rung=0),)))
    batch = driver.prefill([request(2, new=12, adapter_id="a16")], seq=1).batch
    stale = driver._session
    driver.restart_steering()
    with pytest.raises(SteeringViolation, match="another Steer stream"):
        driver.decisions.receive(stale, SteeringUpdate(1))
    while batch is not None:
        batch = driver.decode(batch).batch
    assert driver.tokens[2] == base


def test_a_missing_update_does_not_keep_clear_cache_from_clearing(driver: Driver) -> None:
    driver.prefill([request(1)])
    with pytest.raises(GenerationFailed, match="did not arrive"):
        driver.engine.clear_cache(None, 5)
    assert driver.engine.state().sequences == 0


def test_a_batch_id_in_use_is_refused(driver: Driver) -> None:
    driver.engine.prefill(900, [request(1)], None, 0, 0)
    with pytest.raises(InvalidRequest, match="900 is cached already"):
        driver.engine.prefill(900, [request(2)], None, 0, 0)
    assert driver.engine.state().sequences == 1
    driver.engine.clear_cache(900)


def test_a_long_sequence_beside_short_ones_changes_nothing(driver: Driver) -> None:
    wanted = [request(i, "x" * n, new=6) for i, n in enumerate((3, 300, 20, 150, 70))]
    alone = {r.id: driver.run(r)[r.id] for r in wanted}
    driver.tokens.clear()
    assert driver.run(*wanted) == alone

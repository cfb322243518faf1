"""What KV decisions do to requests while they are served: pages, answers, refusals, and what stays with others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from chunkwise.core import KvDecision, KvFormat, KvScorer, KvUsage, SteeringUpdate
from chunkwise.shard.sequence import Sequence
from conftest import TinyWorld
from serving import Driver, request

FULL, INT8, INT4 = KvFormat.FULL, KvFormat.INT8, KvFormat.INT4
TEXT = "pages of keys and values may shrink while the text that they stand for is being answered, and only then. "


@pytest.fixture(scope="module")
def shared(tiny: TinyWorld) -> Driver:
    return Driver(tiny.model, tiny.adapters, prefix_caching=False)


@pytest.fixture
def driver(shared: Driver) -> Iterator[Driver]:
    """After every test the shard holds nothing."""
    shared.restart_steering()
    shared.tokens.clear()
    shared.errors.clear()
    yield shared
    shared.engine.clear_cache(None)
    shared.engine.check_integrity()
    assert all(usage.pages == 0 for usage in shared.engine.state().kv)


def _kv(driver: Driver) -> dict[KvFormat, KvUsage]:
    return {usage.format: usage for usage in driver.engine.state().kv}


def _pages(driver: Driver) -> tuple[int, int, int]:
    return tuple(_kv(driver)[kind].pages for kind in (FULL, INT8, INT4))


def test_pages_shrink_step_by_step_and_never_grow_again(driver: Driver) -> None:
    before = driver.engine.state()
    batch = driver.prefill([request(1, TEXT, new=12)]).batch
    assert _pages(driver) == (7, 0, 0)
    asked = [
        (KvDecision(1, 0, 64, INT8), (3, 4, 0)),
        (KvDecision(1, 0, 100, INT4), (1, 0, 6)),
        (KvDecision(1, 0, 64, FULL, 50), (1, 0, 4)),
        (KvDecision(1, 64, 100, INT4, 100), (1, 0, 2)),
        (KvDecision(1, 0, 64, FULL, 100), (1, 0, 0)),
    ]
    for seq, (decision, pages) in enumerate(asked, start=1):
        driver.steer(SteeringUpdate(seq, kv=(decision,)))
        batch = driver.decode(batch, seq=seq).batch
        assert _pages(driver) == pages, decision
    after = driver.engine.state()
    assert after.kv_rewritten_pages - before.kv_rewritten_pages == 4 + 6 + 4 + 2 + 2
    assert after.kv_dropped_tokens - before.kv_dropped_tokens == 16 * 6
    assert not driver.errors


def test_bytes_follow_the_formats(driver: Driver) -> None:
    kv = (KvDecision(1, 0, 48, INT8, effective=90), KvDecision(1, 48, 80, INT4, 50, effective=90))
    driver.steer(SteeringUpdate(1, kv=kv))
    driver.decode(driver.prefill([request(1, TEXT)], seq=1).batch, seq=1)
    size = driver.engine._require_runner().cache.allocator.page_bytes
    usage = _kv(driver)
    assert [usage[kind].bytes for kind in (FULL, INT8, INT4)] == [2 * size[FULL], 3 * size[INT8], 1 * size[INT4]]


def test_a_window_equals_a_model_that_masks_what_was_dropped(driver: Driver, tiny: TinyWorld) -> None:
    """Transformers with the same positions, where tokens from ``effective`` on do not see the dropped range."""
    prompt = tuple(driver.engine._tokenizer.encode(TEXT))
    forced = tuple(range(40, 60))
    ids = torch.tensor([prompt + forced])
    n = ids.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    decisions = (KvDecision(1, 16, 64, FULL, 100, effective=70), KvDecision(1, 64, 100, FULL, 100, effective=110))
    mask[70:, 16:64] = False
    mask[110:, 64:96] = False
    model = LlamaForCausalLM.from_pretrained(tiny.model, attn_implementation="eager").eval()
    with torch.inference_mode():
        additive = torch.zeros(1, 1, n, n).masked_fill(~mask, torch.finfo(torch.float32).min)
        expected = model(ids, attention_mask=additive).logits[0].log_softmax(-1)
    driver.steer(SteeringUpdate(1, kv=decisions))
    logprobs: list[float] = []
    result = driver.prefill([request(1, prompt_ids=prompt, forced_ids=forced, new=len(forced))], seq=1)
    while True:
        logprobs += [generation.token.logprob for generation in result.generations]
        if result.batch is None:
            break
        result = driver.decode(result.batch, seq=1)
    want = expected[len(prompt) - 1 : -1].gather(1, torch.tensor(forced)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), want, atol=2e-4, rtol=1e-4)


def test_positions_are_those_of_the_text(driver: Driver) -> None:
    seen: list[tuple[int, int, int]] = []

    def observe(sequences: list[Sequence]) -> None:
        seen.extend((s.computed, s.kv.dropped, len(s.pages)) for s in sequences)

    driver.engine.watch(observe)
    driver.steer(SteeringUpdate(1, kv=(KvDecision(1, 0, 96, INT8, 75, KvScorer.KEY_DIVERSITY, effective=96),)))
    driver.run(request(1, TEXT, new=4), seq=1)
    driver.engine.watch(lambda sequences: None)
    tokens = len(driver.engine._tokenizer.encode(TEXT))
    assert seen == [(96, 0, 6), *((tokens + i, 64, -(-(tokens + i - 64) // 16)) for i in range(4))]


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ((KvDecision(2, 0, 32, INT8), KvDecision(2, 16, 48, INT8)), "without overlap"),
        ((KvDecision(2, 0, 32, INT8, effective=40),), "computed already"),
        ((KvDecision(2, 0, 300, INT8),), "end there or before"),
    ],
)
def test_a_decision_that_breaks_the_protocol_ends_its_request_alone(
    driver: Driver, decisions: tuple[KvDecision, ...], message: str
) -> None:
    alone = driver.run(request(1, TEXT))[1]
    driver.tokens.clear()
    batch = driver.prefill([request(1, TEXT), request(2, TEXT)]).batch
    driver.steer(SteeringUpdate(1, kv=decisions))
    while batch is not None:
        batch = driver.decode(batch, seq=1).batch
    assert message in driver.errors[2]
    assert driver.tokens[1] == alone


def test_reuse_stops_at_the_first_decision_and_the_answer_is_the_same(tiny: TinyWorld) -> None:
    cached, fresh = Driver(tiny.model), Driver(tiny.model, prefix_caching=False)
    for driver in (cached, fresh):
        kv = (KvDecision(2, 0, 48, INT8, 50, effective=50), KvDecision(3, 0, 48, INT4, effective=64))
        driver.steer(SteeringUpdate(1, kv=kv))
    reused = [0]
    for id in (1, 2, 3, 4):
        wanted = request(id, TEXT)
        assert cached.run(wanted, seq=1) == fresh.run(wanted, seq=1)
        reused.append(cached.engine.state().reused_tokens)
    assert reused == [0, 0, 48, 112, 208], "96 tokens are whole pages of the prompt"
    assert len({tuple(cached.tokens[id]) for id in (1, 2, 4)}) == 2


def test_shared_pages_stay_with_others(tiny: TinyWorld) -> None:
    driver = Driver(tiny.model)
    alone = driver.run(request(1, TEXT, new=10))[1]
    batch = driver.prefill([request(2, TEXT, new=10), request(3, TEXT, new=10)]).batch
    assert _pages(driver)[0] == 6 + 2, "six are shared"
    driver.steer(SteeringUpdate(1, kv=(KvDecision(2, 0, 96, INT4), KvDecision(3, 64, 96, FULL, 100))))
    batch = driver.decode(batch, seq=1).batch
    # Two of the six are kept for reuse alone now.
    assert _pages(driver) == (4 + 2, 0, 6)
    later = driver.prefill([request(4, TEXT, new=10)], seq=1).batch
    while batch is not None or later is not None:
        result = driver.decode(*[b for b in (batch, later) if b is not None], seq=1)
        batch, later = result.batch, None
    assert driver.tokens[4] == alone
    assert not driver.errors

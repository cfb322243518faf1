"""Per-token log-likelihoods against transformers and PEFT, and the ranks beside them against the steps' own gates."""

from __future__ import annotations

import warnings

import pytest
import torch

from chunkwise.config.eval_settings import Scoring
from chunkwise.evaluation.driver import Evaluator
from chunkwise.evaluation.modes import BASE, SteeringMode, fixed_rung
from chunkwise.evaluation.nll import Passage, evaluate_nll
from conftest import TinyWorld
from evaluation.worlds import ADAPTIVE, FULL, evaluator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import PeftModel
    from transformers import LlamaForCausalLM

PASSAGES = [
    Passage("short", tuple(b"ab"), 1),
    Passage("most", tuple(b"It was a bright cold day in April, and the clocks were striking thirteen."), 1),
    Passage("tail", tuple(b"Happy families are all alike; every unhappy family is unhappy in its own way." * 2), 120),
]


@pytest.fixture(scope="module")
def stack(tiny: TinyWorld) -> Evaluator:
    return evaluator(tiny)


def oracle(tiny: TinyWorld, adapter: str | None) -> list[list[float]]:
    model = LlamaForCausalLM.from_pretrained(tiny.model).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, tiny.adapters[adapter]).eval()
    expected = []
    for passage in PASSAGES:
        with torch.inference_mode():
            log_p = model(torch.tensor([passage.ids])).logits[0].log_softmax(dim=-1)
        expected.append([-float(log_p[p - 1, passage.ids[p]]) for p in range(passage.first, len(passage.ids))])
    return expected


@pytest.mark.parametrize("scoring", ["prompt", "decode"])
@pytest.mark.parametrize("mode", [BASE, FULL], ids=lambda mode: mode.name)
def test_nll_equals_transformers_and_peft(
    tiny: TinyWorld, stack: Evaluator, mode: SteeringMode, scoring: Scoring
) -> None:
    scores = evaluate_nll(stack, PASSAGES, mode, scoring)
    assert [score.key for score in scores] == ["short", "most", "tail"]
    for score, expected in zip(scores, oracle(tiny, mode.adapter), strict=True):
        assert score.nll == pytest.approx(expected, abs=2e-4)
        assert score.ranks == [16.0 if mode.adapter else 0.0] * len(expected)


def test_both_ways_of_scoring_agree_at_a_fixed_rung(stack: Evaluator) -> None:
    mode = fixed_rung(4, stack.adapters["a16"])
    by_prompt, by_decode = evaluate_nll(stack, PASSAGES, mode, "prompt"), evaluate_nll(stack, PASSAGES, mode, "decode")
    for a, b in zip(by_prompt, by_decode, strict=True):
        assert a.nll == pytest.approx(b.nll, abs=2e-4)
        assert a.ranks == b.ranks
        # The last token is only predicted, and as part of a prompt computed too.
        assert a.trace.computed == b.trace.computed + 1


def test_the_model_s_signals_steer_scored_tokens_in_decode_alone(stack: Evaluator) -> None:
    """A prompt is planned from its ids; a decoded answer by entropies. Both are compressed as they grow."""
    (by_prompt,) = evaluate_nll(stack, PASSAGES[1:2], ADAPTIVE, "prompt")
    (by_decode,) = evaluate_nll(stack, PASSAGES[1:2], ADAPTIVE, "decode")
    assert by_prompt.trace.chunks != by_decode.trace.chunks
    full = evaluate_nll(stack, PASSAGES[1:2], FULL, "decode")[0]
    assert by_decode.trace.kv_bytes_peak < full.trace.kv_bytes_peak
    assert by_prompt.trace.kv_bytes_peak < full.trace.kv_bytes_peak


@pytest.mark.parametrize("scoring", ["prompt", "decode"])
def test_adaptive_scores_are_the_same_alone_and_in_a_batch(stack: Evaluator, scoring: Scoring) -> None:
    together = evaluate_nll(stack, PASSAGES, ADAPTIVE, scoring)
    for passage, score in zip(PASSAGES, together, strict=True):
        (alone,) = evaluate_nll(stack, [passage], ADAPTIVE, scoring)
        assert alone.trace == score.trace
        assert alone.nll == pytest.approx(score.nll, abs=1e-4)

"""Labels against transformers and PEFT, which know the two ends of a ladder: the base model and the whole adapter."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from chunkwise.evaluation.rank_labels import RankLabels, measure_labels
from conftest import TinyWorld
from evaluation.worlds import evaluator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import PeftModel
    from transformers import LlamaForCausalLM

# The second is longer than a step of the evaluator and than the rows that are scored at a time.
TEXTS = (tuple(b"It was a bright cold day."), tuple((7 * i + i * i) % 256 for i in range(150)))


@pytest.fixture(scope="module")
def labels(tiny: TinyWorld) -> list[RankLabels]:
    stack = evaluator(tiny)
    calls: list[None] = []
    measured = measure_labels(stack, stack.adapters["a16"], TEXTS, lambda: calls.append(None))
    assert len(calls) == 2
    return measured


def test_both_ends_are_those_of_transformers_and_peft(tiny: TinyWorld, labels: list[RankLabels]) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny.model).eval()
    with torch.inference_mode():
        without = [base(torch.tensor([text])).logits[0, :-1].log_softmax(dim=-1) for text in TEXTS]
        model = PeftModel.from_pretrained(base, tiny.adapters["a16"]).eval()
        adapted = [model(torch.tensor([text])).logits[0, :-1].log_softmax(dim=-1) for text in TEXTS]
    for text, label, full, none in zip(TEXTS, labels, adapted, without, strict=True):
        assert label.ids == text
        following = torch.tensor(text[1:])[:, None]
        assert label.kl[0].tolist() == pytest.approx((full.exp() * (full - none)).sum(dim=-1).tolist(), abs=1e-3)
        assert label.nll[0].tolist() == pytest.approx((-none.gather(1, following)[:, 0]).tolist(), abs=1e-3)
        assert label.nll[-1].tolist() == pytest.approx((-full.gather(1, following)[:, 0]).tolist(), abs=1e-3)
        entropy = -(full.exp() * full).sum(dim=-1) / math.log(full.shape[-1])
        assert label.entropy.tolist() == pytest.approx(entropy.tolist(), abs=1e-3)


def test_a_label_is_nothing_at_full_rank_and_the_mean_of_two_below(labels: list[RankLabels]) -> None:
    for label in labels:
        assert not label.kl[-1].any() and not label.excess[-1].any()
        assert (label.kl >= -1e-5).all()
        assert label.kl[0].mean() > label.kl[-2].mean() > 0.0
        assert label.loss[1].tolist() == pytest.approx(((label.kl[1] + label.nll[1] - label.nll[-1]) / 2).tolist())

"""Answers and logits against PEFT: unsteered equals PEFT merged and not merged, and a cross-faded token equals the
explicit mixture of the two truncated adapters."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from chunkwise.core import ChunkDecision
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld
from serving import Driver, request
from stepping import Stepper

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import PeftModel
    from transformers import LlamaForCausalLM

PROMPT = list(b"What PEFT computes is the truth.")


def _peft(tiny: TinyWorld, name: str) -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(tiny.model)
    return PeftModel.from_pretrained(base, tiny.adapters[name]).eval()


@pytest.mark.parametrize("name", ["a4", "a8", "a16"])
def test_unsteered_logits_equal_peft_merged_and_not(tiny: TinyWorld, name: str) -> None:
    got = Stepper(tiny.model, tiny.adapters).prefill("x", PROMPT, name)
    model = _peft(tiny, name)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        torch.testing.assert_close(got, model(ids).logits[0, -1], atol=3e-4, rtol=1e-4)
        merged = model.merge_and_unload()
        torch.testing.assert_close(got, merged(ids).logits[0, -1], atol=3e-4, rtol=1e-4)


def test_unsteered_answers_equal_peft_in_a_mixed_batch(tiny: TinyWorld) -> None:
    driver = Driver(tiny.model, tiny.adapters)
    names = [None, "a4", "a8", "a16"]
    got = driver.run(*(request(i, adapter_id=name, new=24) for i, name in enumerate(names)))
    for i, name in enumerate(names):
        model = LlamaForCausalLM.from_pretrained(tiny.model).eval() if name is None else _peft(tiny, name)
        prompt = torch.tensor([Tokenizer(tiny.model).encode("Hello there, General.")])
        with torch.inference_mode():
            answer = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=257,
            )[0, prompt.shape[1] :]
        assert got[i] == answer.tolist()


def _mixture_model(tiny: TinyWorld, parts: list[tuple[int, float]]) -> LlamaForCausalLM:
    """The base with ``Σ weight · (adapter truncated to rank)`` merged into its weights, from the SVD of PEFT's own
    delta, not from our ladder."""
    base = LlamaForCausalLM.from_pretrained(tiny.model).eval()
    for module in _peft(tiny, "a16").modules():
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A:
            delta = module.get_delta_weight("default")
            u, s, vt = torch.linalg.svd(delta, full_matrices=False)
            mixed = sum(weight * (u[:, :k] * s[:k]) @ vt[:k] for k, weight in parts)
            target = next(
                m
                for m in base.modules()
                if getattr(m, "weight", None) is not None
                and m.weight.shape == delta.shape
                and torch.equal(m.weight, module.base_layer.weight)
            )
            target.weight.data += mixed
    return base


@pytest.mark.parametrize("token", [0, 1, 2, 3])
def test_gate_in_the_window_equals_the_explicit_mixture_of_adapters(tiny: TinyWorld, token: int) -> None:
    """Token ``token`` of a chunk with a window of three: its output is the mixture of the two rungs' outputs. The
    prompt runs at rung 0, so keys and values before the probed token are the base model's in both computations."""
    window, old, new, scale = 3, 2, 8, 1.5
    stepper = Stepper(tiny.model, tiny.adapters)
    stepper.chunks[0] = [ChunkDecision(0, 0, rung=0)]
    stepper.prefill("probe", PROMPT, "a16")
    stepper.chunks[0] = [
        ChunkDecision(0, 0, rung=old),
        ChunkDecision(0, len(PROMPT) - token, rung=new, scale=scale, crossfade=window),
    ]
    got = stepper.decode({"probe": 65})["probe"]
    alpha = min((token + 1) / (window + 1), 1.0)
    expected = _continue(tiny, [(new, alpha * scale), (old, 1.0 - alpha)])
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-4)


def _continue(tiny: TinyWorld, parts: list[tuple[int, float]]) -> Tensor:
    """Prompt through the base model, then one token through the base with the mixture merged in."""
    base = LlamaForCausalLM.from_pretrained(tiny.model).eval()
    mixed = _mixture_model(tiny, parts)
    with torch.inference_mode():
        past = base(torch.tensor([PROMPT]), use_cache=True).past_key_values
        return mixed(torch.tensor([[65]]), past_key_values=past).logits[0, -1]

"""Logits against transformers over the family's switches, whole and in pieces, alone and in a ragged batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stepping import Stepper

CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "multi-head": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 18},
    "head_dim apart from hidden": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    from tiny import make_model

    reference = make_model(tmp_path, seed=5, **CASES[name])
    ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    stepper = Stepper(tmp_path)
    whole = stepper.prefill("whole", ids.tolist())
    stepper.prefill("pieces", ids[:33].tolist())
    stepper.prefill("pieces", ids[33:69].tolist())
    decoded = stepper.decode({"pieces": int(ids[69])})["pieces"]
    torch.testing.assert_close(whole, expected[-1], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(decoded, expected[-1], atol=2e-4, rtol=1e-4)


def test_checkpoint_in_many_files_equals_one(tmp_path: Path) -> None:
    from tiny import make_model

    make_model(tmp_path / "one", seed=5)
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "many" / name).write_bytes((tmp_path / "one" / name).read_bytes())
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ids = list(range(40))
    assert torch.equal(Stepper(tmp_path / "one").prefill("x", ids), Stepper(tmp_path / "many").prefill("x", ids))


def test_ragged_batch_equals_alone(tmp_path: Path) -> None:
    from tiny import make_model

    make_model(tmp_path, seed=6)
    stepper, alone = Stepper(tmp_path), Stepper(tmp_path)
    prompts = {
        "a": list(b"a short one"),
        "b": list(b"this prompt is quite a bit longer than a page of tokens"),
        "c": [7],
    }
    for name, ids in prompts.items():
        stepper.prefill(name, ids)
    batched = stepper.decode({"a": 1, "b": 2, "c": 3})
    for token, (name, ids) in enumerate(prompts.items(), start=1):
        alone.prefill(name, ids)
        torch.testing.assert_close(batched[name], alone.decode({name: token})[name], atol=1e-4, rtol=1e-4)

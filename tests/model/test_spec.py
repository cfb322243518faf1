"""config.json in the spellings of transformers 4 and 5, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chunkwise.core import UnsupportedModel
from chunkwise.model.spec import load_spec, parse_spec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "rope_theta": 5000.0,
}


def test_defaults_are_those_of_transformers() -> None:
    spec = parse_spec(LLAMA)
    assert (spec.head_dim, spec.norm_eps, spec.tied_head, spec.max_position) == (16, 1e-6, False, 2048)


def test_transformers_5_spelling() -> None:
    config = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    config |= {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    spec = parse_spec(config)
    assert (spec.rope_theta, spec.rope_scaling, spec.dtype) == (5000.0, None, "bfloat16")
    config["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}
    scaling = parse_spec(config).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
    ],
)
def test_what_cannot_be_served_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        parse_spec(LLAMA | change)


def test_missing_key_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'hidden_size'"):
        parse_spec({k: v for k, v in LLAMA.items() if k != "hidden_size"})
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        load_spec(tmp_path)

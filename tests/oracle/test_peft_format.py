"""PEFT is the oracle: what it saves must load to the same ΔW, and what plain LoRA cannot express must be refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from chunkwise_adapters.format import AdapterError, LoraWeights, ModuleKey, UnsupportedAdapter, load_adapter
from chunkwise_adapters.ladder import build_ladder

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[ModuleKey, tuple[int, int]] = {
    (layer, target): {"k_proj": (16, 32), "v_proj": (16, 32), "down_proj": (32, 48)}.get(
        target, (48, 32) if target in ("gate_proj", "up_proj") else (32, 32)
    )
    for layer in range(2)
    for target in ALL
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 24, "target_modules": ALL},
    "some modules": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    "one layer": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "layers_to_transform": [1]},
    "regex": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.1\.mlp\.(gate|up)_proj"},
    "all-linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "rslora": {"r": 8, "lora_alpha": 24, "target_modules": ALL, "use_rslora": True},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ALL,
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 5, ".*mlp.*": 12},
        "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 5, "down_proj": 7, "up_proj": 1},
    },
    "patterns and rslora": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ALL,
        "rank_pattern": {"down_proj": 24, "k_proj": 20},
        "alpha_pattern": {".*[qk]_proj": 3},
        "use_rslora": True,
    },
    "orthogonal": {"r": 8, "lora_alpha": 16, "target_modules": ALL, "init_lora_weights": "orthogonal"},
    "gaussian": {"r": 8, "lora_alpha": 16, "target_modules": ALL, "init_lora_weights": "gaussian"},
}


def peft_model(base: type[LlamaForCausalLM | LlamaModel], options: Mapping[str, Any]) -> PeftModel:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lora_bias=True.*no bias.*")
        model = get_peft_model(base(LlamaConfig(**CONFIG)), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    return model


def save(model: PeftModel, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file")
        warnings.filterwarnings("ignore", message=r"Adapter 'default': .*lora_B\.bias")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        model.save_pretrained(str(path))
    return path


def peft_deltas(model: PeftModel) -> dict[ModuleKey, Tensor]:
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            parts = name.split(".")
            deltas[int(parts[parts.index("layers") + 1]), parts[-1]] = module.get_delta_weight("default").detach()
    return deltas


def our_deltas(weights: LoraWeights) -> dict[ModuleKey, Tensor]:
    return {key: pair.scale * (pair.b @ pair.a) for key, pair in weights.modules.items()}


@pytest.mark.parametrize(
    ("base", "variant"),
    [
        *((LlamaForCausalLM, variant) for variant in VARIANTS),
        (LlamaModel, "plain"),
        (LlamaModel, "patterns and rslora"),
    ],
)
def test_loaded_update_equals_peft_s(tmp_path: Path, base: type[LlamaForCausalLM | LlamaModel], variant: str) -> None:
    model = peft_model(base, VARIANTS[variant])
    expected = peft_deltas(model)
    weights = load_adapter(save(model, tmp_path), "a", SHAPES)
    deltas = our_deltas(weights)
    assert deltas.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(deltas[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_rank_ladder_equals_peft_s_update(tmp_path: Path, variant: str) -> None:
    model = peft_model(LlamaForCausalLM, VARIANTS[variant])
    ladder = build_ladder(load_adapter(save(model, tmp_path), "a", SHAPES))
    for key, expected in peft_deltas(model).items():
        module, k = ladder.modules[key], ladder.active_ranks[key][-1]
        torch.testing.assert_close(module.b_t[:k].T @ module.a[:k], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [0, 1]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_2"},
        {"init_lora_weights": "olora"},
    ],
    ids=str,
)
def test_adapters_beyond_plain_lora_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    model = peft_model(LlamaForCausalLM, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **options})
    with pytest.raises(UnsupportedAdapter):
        load_adapter(save(model, tmp_path), "a", SHAPES)


def test_an_adapter_of_another_base_model_is_refused(tmp_path: Path) -> None:
    model = peft_model(LlamaForCausalLM, VARIANTS["plain"])
    shapes = {key: (out * 2, inp * 2) for key, (out, inp) in SHAPES.items()}
    with pytest.raises(AdapterError, match=r"\(32, 48\).*\(64, 96\)"):
        load_adapter(save(model, tmp_path), "a", shapes)

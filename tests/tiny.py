"""A tiny random LLaMA, its tokenizer and LoRA adapters, made on the spot with transformers and peft: no downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_tokenizer(directory: Path) -> None:
    """A byte tokenizer: 256 bytes, then <bos> 256 and <eos> 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<bos>", eos_token="<eos>").save_pretrained(directory)


def make_model(directory: Path, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Nine query heads over three KV heads, as SmolLM2, so that world sizes 2 and 4 divide unevenly."""
    config = LlamaConfig(
        **{
            "vocab_size": 259,
            "hidden_size": 72,
            "num_hidden_layers": 4,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "intermediate_size": 101,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "initializer_range": 0.2,
            **overrides,
        }
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, max_shard_size=overrides.pop("shard_size", "5GB"))
    make_tokenizer(directory)
    return model


def make_adapter(model: LlamaForCausalLM, directory: Path, rank: int, seed: int, **overrides: Any) -> None:
    """A PEFT adapter with random A and B on all seven targets, strong enough to change greedy answers."""
    config = LoraConfig(
        **{"r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **overrides}
    )
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.06)
    peft_model.save_pretrained(directory)
    peft_model.unload()

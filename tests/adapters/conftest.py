"""A tiny base model's shapes, random adapters for it, and PEFT directories written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from chunkwise_adapters.format import LoraPair, LoraWeights, ModuleKey

HIDDEN, KV, MLP, LAYERS = 48, 40, 64, 2
TARGET_SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KV, HIDDEN),
    "v_proj": (KV, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (MLP, HIDDEN),
    "up_proj": (MLP, HIDDEN),
    "down_proj": (HIDDEN, MLP),
}

MakeWeights = Callable[..., LoraWeights]
WriteAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def shapes() -> dict[ModuleKey, tuple[int, int]]:
    """(out, in) of every module of the base model: 2 layers, hidden 48, kv 40, mlp 64."""
    return {(layer, target): shape for layer in range(LAYERS) for target, shape in TARGET_SHAPES.items()}


@pytest.fixture(scope="session")
def make_weights(shapes: Mapping[ModuleKey, tuple[int, int]]) -> MakeWeights:
    """make_weights(name, rank, seed): random factors; a mapping of ranks per module adapts only the modules in it."""

    def make(name: str = "a", rank: int | Mapping[ModuleKey, int] = 32, seed: int = 0) -> LoraWeights:
        generator = torch.Generator().manual_seed(seed)
        ranks = dict.fromkeys(shapes, rank) if isinstance(rank, int) else rank
        modules = {}
        for key, r in ranks.items():
            out, inp = shapes[key]
            decay = torch.logspace(0, -1.5, r)
            modules[key] = LoraPair(
                a=torch.randn(r, inp, generator=generator) * decay[:, None],
                b=torch.randn(out, r, generator=generator) * (0.2 + torch.rand((), generator=generator)),
                trained_rank=r,
                scale=0.5,
            )
        return LoraWeights(name, f"{seed}-hash-of-{name}", modules)

    return make


@pytest.fixture
def adapter_tensors() -> dict[str, Tensor]:
    """The tensors of a valid rank-4 adapter of layer 0's q_proj and layer 1's down_proj."""
    generator = torch.Generator().manual_seed(1)
    prefix = "base_model.model.model.layers"
    return {
        f"{prefix}.0.self_attn.q_proj.lora_A.weight": torch.randn(4, HIDDEN, generator=generator),
        f"{prefix}.0.self_attn.q_proj.lora_B.weight": torch.randn(HIDDEN, 4, generator=generator),
        f"{prefix}.1.mlp.down_proj.lora_A.weight": torch.randn(4, MLP, generator=generator),
        f"{prefix}.1.mlp.down_proj.lora_B.weight": torch.randn(HIDDEN, 4, generator=generator),
    }


@pytest.fixture
def write_adapter(tmp_path: Path) -> WriteAdapter:
    """write_adapter(tensors, directory=..., **options): a PEFT directory; options override r=4, lora_alpha=8."""

    def write(tensors: Mapping[str, Tensor], directory: str = "adapter", **options: Any) -> Path:
        root = tmp_path / directory
        root.mkdir(parents=True)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **options}
        (root / "adapter_config.json").write_text(json.dumps(config))
        save_file(dict(tensors), root / "adapter_model.safetensors")
        return root

    return write

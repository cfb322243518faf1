"""What a LLaMA checkpoint is, read from its Hugging Face ``config.json``; what cannot be served is refused here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkwise.core import UnsupportedModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Scaling of the rotary frequencies. ``kind`` "linear" uses ``factor`` alone; "llama3" uses all fields."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Dimensions and switches of a LLaMA."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_head: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def target_shapes(self) -> dict[tuple[int, str], tuple[int, int]]:
        """Shape (out, in) of every linear module that LoRA may target, by (layer, target)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return {(layer, target): shapes[target] for layer in range(self.layers) for target in TARGETS}


def _rope_scaling(config: dict[str, Any]) -> RopeScaling | None:
    raw = config.get("rope_scaling") or config.get("rope_parameters")
    if not raw:
        return None
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(raw["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(raw["factor"]),
            float(raw["low_freq_factor"]),
            float(raw["high_freq_factor"]),
            int(raw["original_max_position_embeddings"]),
        )
    raise UnsupportedModel(f"rope scaling {kind!r} is not supported; supported are default, linear and llama3")


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("model_type") != "llama":
        raise UnsupportedModel(f"model_type is {config.get('model_type')!r}; this server runs 'llama' checkpoints only")
    if config.get("quantization_config"):
        raise UnsupportedModel("the checkpoint is quantized; serve the original safetensors checkpoint instead")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act is {config['hidden_act']!r}; LLaMA's 'silu' is supported")


def parse_spec(config: dict[str, Any]) -> ModelSpec:
    """The specification in a parsed ``config.json`` (transformers 4 and 5 spellings).

    Raises:
        UnsupportedModel: another architecture, an unknown rope scaling, a quantized checkpoint, or a missing key.
    """
    _refuse_unsupported(config)
    try:
        heads = int(config["num_attention_heads"])
        kv_heads = int(config.get("num_key_value_heads") or heads)
        hidden = int(config["hidden_size"])
        rope = config.get("rope_parameters") or {}
        spec = ModelSpec(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            max_position=int(config.get("max_position_embeddings", 2048)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(config.get("rope_theta", rope.get("rope_theta", 10000.0))),
            rope_scaling=_rope_scaling(config),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        )
    except KeyError as error:
        raise UnsupportedModel(f"config.json lacks {error.args[0]!r}, which a LLaMA needs") from error
    if spec.heads % spec.kv_heads != 0:
        raise UnsupportedModel(f"{spec.heads} attention heads do not divide into {spec.kv_heads} KV heads")
    return spec


def load_spec(model_dir: Path) -> ModelSpec:
    """`parse_spec` of ``model_dir/config.json``. Raises UnsupportedModel, also when the file cannot be read."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path} cannot be read: {error}; give a Hugging Face model directory") from error
    return parse_spec(config)

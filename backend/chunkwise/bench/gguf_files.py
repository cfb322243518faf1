"""The same checkpoint and adapters as GGUF, for llama.cpp. Plain LLaMA only; vocabulary left out, as tokens go as ids.

GGUF's rotary layout pairs neighbouring dimensions where Hugging Face pairs the halves of a head, so the rows of q and k
are reordered: those of the base, and of an adapter's B for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from safetensors import safe_open

from chunkwise.core import ChunkwiseError
from chunkwise.model.spec import ModelSpec, load_spec
from chunkwise_adapters.format import load_adapter

Array = npt.NDArray[Any]

FILE_TYPES = {
    "F32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TARGETS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}": _TARGETS[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{name}": _TARGETS[name] for name in ("gate_proj", "up_proj", "down_proj")},
}


class NotConvertible(ChunkwiseError):
    """A checkpoint or adapter that these writers have no form for."""


def to_gguf_rows(weight: Array, heads: int) -> Array:
    """Rows of a q or k matrix, or of an adapter's B for it, [heads · dim, in], in GGUF's rotary order."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_base(model: Path, file: Path, kind: str) -> None:
    """Writes the checkpoint with its matrices as ``kind``, a key of `FILE_TYPES`, and its norms as F32. Embedding and
    head of Q4_0 are Q8_0: ours are in 8 bits too, and llama.cpp's own files keep them in more bits than the layers.

    Raises:
        NotConvertible: the checkpoint has a rotary scaling or tensors that a plain LLaMA does not have.
        UnsupportedModel: it is not a LLaMA that ChunkWise serves.
    """
    spec = load_spec(model)
    if spec.rope_scaling is not None:
        raise NotConvertible(f"{model} has rope_scaling, which this converter does not write; leave llama.cpp out")
    tensor_type, file_type = FILE_TYPES[kind]
    writer = GGUFWriter(file, "llama")
    _add_facts(writer, spec)
    writer.add_file_type(file_type)
    for name, weight in _weights(model):
        if spec.tied_head and name == "lm_head.weight":
            continue
        target = _gguf_name(name)
        if ".attn_q." in target:
            weight = to_gguf_rows(weight, spec.heads)
        elif ".attn_k." in target:
            weight = to_gguf_rows(weight, spec.kv_heads)
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(target, weight)
        else:
            table = kind == "Q4_0" and not target.startswith("blk.")
            stored = GGMLQuantizationType.Q8_0 if table else tensor_type
            writer.add_tensor(target, quantize(weight, stored), raw_dtype=stored)
    _finish(writer)


def write_adapter(adapter: Path, model: Path, file: Path) -> None:
    """Writes a PEFT adapter in F32.

    Raises:
        NotConvertible: its modules have different ratios of scale to rank; GGUF has one alpha for all.
        AdapterError: it is not an adapter that ChunkWise serves.
    """
    spec = load_spec(model)
    heads = {"attn_q": spec.heads, "attn_k": spec.kv_heads}
    pairs = load_adapter(adapter, adapter.name, spec.target_shapes()).modules
    # llama.cpp applies alpha / rank, with the rank read off each B.
    alphas = {pair.scale * pair.trained_rank for pair in pairs.values()}
    if len(alphas) != 1:
        raise NotConvertible(f"{adapter} has alphas {sorted(alphas)}; GGUF has one for all modules")
    writer = GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alphas.pop())
    for (layer, target), pair in sorted(pairs.items()):
        name = _TARGETS[target]
        b = pair.b.numpy()
        writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", np.ascontiguousarray(pair.a.numpy()))
        b = to_gguf_rows(b, heads[name]) if name in heads else b
        writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", np.ascontiguousarray(b))
    _finish(writer)


def _add_facts(writer: GGUFWriter, spec: ModelSpec) -> None:
    writer.add_context_length(spec.max_position)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab)
    writer.add_tokenizer_model("none")


def _weights(model: Path) -> Iterator[tuple[str, Array]]:
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_tensor(name).float().numpy()


def _gguf_name(name: str) -> str:
    path = name.removesuffix(".weight")
    if path in _OUTER:
        return f"{_OUTER[path]}.weight"
    layers, _, inner = path.removeprefix("model.layers.").partition(".")
    if inner not in _INNER:
        raise NotConvertible(f"tensor {name} is not one of a plain LLaMA; leave llama.cpp out")
    return f"blk.{layers}.{_INNER[inner]}.weight"


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

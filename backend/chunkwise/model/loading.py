"""A checkpoint becomes the matrices of one tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chunkwise.model.linear import Matrix, Projection, quantize_rows
from chunkwise.model.parallel import ShardPlan
from chunkwise.model.spec import ModelSpec
from chunkwise.model.weights import Checkpoint
from chunkwise_adapters.ops import GatedLora
from chunkwise_adapters.store import TargetSlice


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer of this rank."""

    input_norm: Tensor
    qkv: Projection
    output: Projection
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection


def target_slices(spec: ModelSpec, plan: ShardPlan) -> dict[str, TargetSlice]:
    """This rank's part of every LoRA target: outputs of q, k, v, gate and up, inputs of o and down."""

    def dims(heads: slice) -> slice:
        return slice(heads.start * spec.head_dim, heads.stop * spec.head_dim)

    everything = slice(0, spec.hidden)
    q, kv = dims(plan.heads), dims(plan.kv_heads)
    return {
        "q_proj": TargetSlice(out=q, inp=everything),
        "k_proj": TargetSlice(out=kv, inp=everything),
        "v_proj": TargetSlice(out=kv, inp=everything),
        "o_proj": TargetSlice(out=everything, inp=q),
        "gate_proj": TargetSlice(out=plan.mlp, inp=everything),
        "up_proj": TargetSlice(out=plan.mlp, inp=everything),
        "down_proj": TargetSlice(out=everything, inp=plan.mlp),
    }


class _Loader:
    """Builds layers from a checkpoint; exists only while the model is read."""

    def __init__(
        self, spec: ModelSpec, plan: ShardPlan, checkpoint: Checkpoint, rank: int, storage: torch.dtype, lora: GatedLora
    ) -> None:
        self._spec = spec
        self._plan = plan
        self._slices = target_slices(spec, plan)
        self._shapes = spec.target_shapes()
        self._checkpoint = checkpoint
        self._rank = rank
        self._storage = storage
        self._lora = lora

    def _matrix(self, weight: Tensor) -> Matrix:
        return quantize_rows(weight) if self._storage == torch.int8 else Matrix(weight.to(self._storage))

    def table(self, name: str) -> Matrix:
        """This rank's rows of the embedding or the head."""
        shape = (self._spec.vocab, self._spec.hidden)
        return self._matrix(self._checkpoint.read(name, shape, self._plan.vocab))

    def _projection(self, layer: int, block: str, targets: tuple[str, ...], *, bias: bool, row: bool) -> Projection:
        weights, biases, columns, start = [], [], [], 0
        for target in targets:
            name = f"model.layers.{layer}.{block}.{target}"
            shape, part = self._shapes[layer, target], self._slices[target]
            weights.append(self._checkpoint.read(f"{name}.weight", shape, part.out, part.inp))
            if bias:
                biases.append(self._checkpoint.read(f"{name}.bias", shape[:1], part.out))
            columns.append((target, slice(start, start + weights[-1].shape[0])))
            start += weights[-1].shape[0]
        # A row-parallel bias must enter the sum over ranks once: rank 0 adds it.
        use_bias = bool(biases) and (not row or self._rank == 0)
        return Projection(
            layer,
            self._matrix(torch.cat(weights)),
            torch.cat(biases) if use_bias else None,
            tuple(columns),
            self._lora,
        )

    def layer(self, i: int) -> Layer:
        """Layer ``i`` of this rank."""
        spec, hidden = self._spec, (self._spec.hidden,)
        attention, mlp = {"bias": spec.attention_bias}, {"bias": spec.mlp_bias}
        return Layer(
            self._checkpoint.read(f"model.layers.{i}.input_layernorm.weight", hidden),
            self._projection(i, "self_attn", ("q_proj", "k_proj", "v_proj"), **attention, row=False),
            self._projection(i, "self_attn", ("o_proj",), **attention, row=True),
            self._checkpoint.read(f"model.layers.{i}.post_attention_layernorm.weight", hidden),
            self._projection(i, "mlp", ("gate_proj", "up_proj"), **mlp, row=False),
            self._projection(i, "mlp", ("down_proj",), **mlp, row=True),
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything one rank reads; ``embedding`` and ``head`` are one matrix where they are tied."""

    layers: tuple[Layer, ...]
    norm: Tensor
    embedding: Matrix
    head: Matrix


def load_weights(
    model_dir: Path,
    spec: ModelSpec,
    plan: ShardPlan,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    storage: torch.dtype,
    lora: GatedLora,
) -> Weights:
    """One rank's weights in ``dtype``, the matrices in ``storage``. Raises UnsupportedModel."""
    with Checkpoint(model_dir, dtype, device) as checkpoint:
        loader = _Loader(spec, plan, checkpoint, rank, storage, lora)
        layers = []
        for i in range(spec.layers):
            layers.append(loader.layer(i))
            checkpoint.unmap()
        norm = checkpoint.read("model.norm.weight", (spec.hidden,))
        embedding = loader.table("model.embed_tokens.weight")
        head = embedding if spec.tied_head else loader.table("lm_head.weight")
    return Weights(tuple(layers), norm, embedding, head)

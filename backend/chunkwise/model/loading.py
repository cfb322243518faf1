"""A checkpoint becomes the matrices of one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from chunkwise.model.linear import FOUR_BITS, Matrix, Projection, empty_matrix, store_matrix
from chunkwise.model.parallel import ShardPlan
from chunkwise.model.spec import ModelSpec
from chunkwise.model.weights import Checkpoint
from chunkwise_adapters.arena import Arena
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


_ROWS = 1024


class _Part(NamedTuple):
    """Rows and columns of one tensor of the checkpoint, whose whole shape is ``shape``."""

    name: str
    shape: tuple[int, int]
    rows: slice
    columns: slice | None


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
        self._arena = Arena()
        self._lora = lora

    def _read(self, parts: Sequence[_Part], rows: int, columns: int, storage: torch.dtype) -> Matrix:
        """The ``parts`` below each other, ``[rows, columns]`` in ``storage``. They are read a few rows at a time into
        their place: a whole matrix, as it is stored, converted and joined, would be most of the process's peak
        memory."""
        checkpoint = self._checkpoint
        matrix = empty_matrix(rows, columns, storage, self._allocate)
        at = 0
        for name, shape, part_rows, part_columns in parts:
            for start in range(part_rows.start, part_rows.stop, _ROWS):
                piece = slice(start, min(start + _ROWS, part_rows.stop))
                weight = checkpoint.read(name, shape, piece, part_columns)
                place = slice(at, at + weight.shape[0])
                kept = store_matrix(weight, storage)
                matrix.data[place] = kept.data
                for whole, part in ((matrix.scales, kept.scales), (matrix.middles, kept.middles)):
                    if whole is not None and part is not None:
                        whole[place] = part
                at = place.stop
            checkpoint.unmap()
        return matrix

    def _allocate(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        device = self._checkpoint.device
        if device.type == "cpu":
            return self._arena.empty(rows, columns, dtype)
        return torch.empty(rows, columns, dtype=dtype, device=device)

    def table(self, name: str) -> Matrix:
        """This rank's rows of the embedding or the head. Where layers are kept in 4 bits these are in 8: their errors
        would enter every answer directly."""
        hidden, vocab = self._spec.hidden, self._plan.vocab
        part = _Part(name, (self._spec.vocab, hidden), vocab, None)
        storage = torch.int8 if self._storage == FOUR_BITS else self._storage
        return self._read([part], vocab.stop - vocab.start, hidden, storage)

    def _projection(self, layer: int, block: str, targets: tuple[str, ...], *, bias: bool, row: bool) -> Projection:
        parts, biases, columns, start, width = [], [], [], 0, 0
        for target in targets:
            name = f"model.layers.{layer}.{block}.{target}"
            shape, part = self._shapes[layer, target], self._slices[target]
            out, inp = range(shape[0])[part.out], range(shape[1])[part.inp]
            parts.append(_Part(f"{name}.weight", shape, slice(out.start, out.stop), part.inp))
            if bias:
                biases.append(self._checkpoint.read(f"{name}.bias", shape[:1], part.out))
            columns.append((target, slice(start, start + len(out))))
            start, width = start + len(out), len(inp)
        # A row-parallel bias must enter the sum over ranks once: rank 0 adds it.
        use_bias = bool(biases) and (not row or self._rank == 0)
        return Projection(
            layer,
            self._read(parts, start, width, self._storage),
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
        embedding = loader.table("model.embed_tokens.weight")
        head = embedding if spec.tied_head else loader.table("lm_head.weight")
        layers = [loader.layer(i) for i in range(spec.layers)]
        norm = checkpoint.read("model.norm.weight", (spec.hidden,))
    return Weights(tuple(layers), norm, embedding, head)

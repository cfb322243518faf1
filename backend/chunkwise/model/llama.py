"""The LLaMA itself: one model for prefill and decode, with and without LoRA, on one rank or many.

It computes what a `StepInput` says; it does not know requests, sampling or steering.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkwise.kv.cache import KvCache, KvShape
from chunkwise.model.attention import PagedAttention
from chunkwise.model.linear import Projection, choose_product
from chunkwise.model.parallel import Group, ShardPlan, plan_shard
from chunkwise.model.rotary import Rotary, rotate
from chunkwise.model.spec import ModelSpec, load_spec
from chunkwise.model.step import StepInput, StepOutput
from chunkwise.model.weights import Checkpoint
from chunkwise_adapters.ops import choose_op
from chunkwise_adapters.store import TargetSlice

_SCORED_ROWS = 128


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

    def __init__(self, spec: ModelSpec, plan: ShardPlan, checkpoint: Checkpoint, rank: int) -> None:
        self._spec = spec
        self._slices = target_slices(spec, plan)
        self._shapes = spec.target_shapes()
        self._checkpoint = checkpoint
        self._rank = rank
        self._product = choose_product(checkpoint.device, checkpoint.dtype)
        self._lora = choose_op(checkpoint.device)

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
            torch.cat(weights),
            torch.cat(biases) if use_bias else None,
            tuple(columns),
            self._product,
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


class Llama:
    """One rank of a LLaMA.

    Embedding and head are divided by vocabulary rows; where they are tied, both are one tensor.
    """

    def __init__(self, model_dir: Path, group: Group, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = load_spec(model_dir)
        self.dtype = dtype
        self.device = device
        self.group = group
        self.plan = plan_shard(self.spec, group.rank, group.world_size)
        self._product = choose_product(device, dtype)
        spec, table = self.spec, (self.spec.vocab, self.spec.hidden)
        with Checkpoint(model_dir, dtype, device) as checkpoint:
            loader = _Loader(spec, self.plan, checkpoint, group.rank)
            self._layers = []
            for i in range(spec.layers):
                self._layers.append(loader.layer(i))
                checkpoint.unmap()
            self._norm = checkpoint.read("model.norm.weight", (spec.hidden,))
            self._embedding = checkpoint.read("model.embed_tokens.weight", table, self.plan.vocab)
            self._head = (
                self._embedding if spec.tied_head else checkpoint.read("lm_head.weight", table, self.plan.vocab)
            )
        self._rotary = Rotary(spec, device)
        # Rank 0 holds query head 0 at every world size, so the attention signal does not depend on the layout.
        self._signal_layers = {spec.layers // 4, spec.layers // 2, 3 * spec.layers // 4} if group.rank == 0 else set()

    def kv_shape(self, page_size: int) -> KvShape:
        """Shape of the KV cache this rank needs."""
        return KvShape(self.spec.layers, self.plan.n_kv_heads, self.spec.head_dim, page_size)

    @torch.inference_mode()
    def forward(self, step: StepInput, cache: KvCache) -> StepOutput:
        """One step: writes keys and values to ``cache`` and returns next-token logits of every sequence."""
        attention = PagedAttention(cache)
        cos, sin = self._rotary.angles(step.positions, self.dtype)
        x = self._embed(step.ids)
        spreads: list[Tensor] = []
        for i, layer in enumerate(self._layers):
            q, k, v = self._project(layer, x, step, (cos, sin))
            mixed = attention.forward(i, step, q, k, v).reshape(x.shape[0], -1)
            if i in self._signal_layers:
                spreads.append(attention.head_spread(i, step, q))
            x = x + self.group.sum_(layer.output.forward(mixed, step.segments))
            x = x + self._mlp(layer, x, step)
        logits = self._logits(x[step.last_rows])
        return StepOutput(logits, self._scores(x, step), torch.stack(spreads).mean(dim=0) if spreads else None)

    def _norm_of(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.spec.hidden,), weight, self.spec.norm_eps)

    def _project(
        self, layer: Layer, x: Tensor, step: StepInput, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan, dim = self.plan, self.spec.head_dim
        qkv = layer.qkv.forward(self._norm_of(x, layer.input_norm), step.segments)
        heads = qkv.view(x.shape[0], -1, dim)
        q, k, v = torch.split(heads, [plan.n_heads, plan.n_kv_heads, plan.n_kv_heads], dim=1)
        return rotate(q, *angles), rotate(k, *angles), v

    def _mlp(self, layer: Layer, x: Tensor, step: StepInput) -> Tensor:
        gate_up = layer.gate_up.forward(self._norm_of(x, layer.mlp_norm), step.segments)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.group.sum_(layer.down.forward(F.silu(gate) * up, step.segments))

    def _embed(self, ids: Tensor) -> Tensor:
        if self.group.world_size == 1:
            return F.embedding(ids, self._embedding)
        local = ids - self.plan.vocab.start
        mine = (local >= 0) & (local < self._embedding.shape[0])
        rows = F.embedding(local.where(mine, 0), self._embedding)
        return self.group.sum_(rows.masked_fill_(~mine[:, None], 0.0))

    def _logits(self, x: Tensor) -> Tensor:
        local = self._product(self._norm_of(x, self._norm), self._head).float()
        return self.group.gather_columns(local, self.spec.vocab)

    def _scores(self, x: Tensor, step: StepInput) -> Tensor:
        # Some rows at a time: the logits of a whole prompt would be far larger than the model.
        parts = [x.new_empty(0, dtype=torch.float32)]
        for start in range(0, step.scored_rows.shape[0], _SCORED_ROWS):
            rows, ids = (t[start : start + _SCORED_ROWS] for t in (step.scored_rows, step.scored_ids))
            parts.append(self._logits(x[rows]).log_softmax(dim=-1).gather(1, ids[:, None])[:, 0])
        return torch.cat(parts)

"""The decoder layers in torch operations: the reference of the CPU kernels, and what runs everywhere else."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkwise.kv.cache import KvCache
from chunkwise.model.attention import PagedAttention
from chunkwise.model.loading import Layer, Weights
from chunkwise.model.parallel import Group, ShardPlan
from chunkwise.model.rotary import Rotary, rotate
from chunkwise.model.spec import ModelSpec
from chunkwise.model.step import StepInput


class Decoder(Protocol):
    """The embedding, all layers of one rank, and its part of the head."""

    def run(self, step: StepInput, cache: KvCache) -> tuple[Tensor, Tensor | None]:
        """The hidden states [T, hidden] of the step's tokens, good until the next call, and the attention spread [S]
        where this rank reports it. Writes keys and values to ``cache``."""
        ...

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """This rank's columns of the logits, fp32 [n, local vocabulary], of the ``rows`` [n] of hidden states ``x``."""
        ...


def signal_layers(spec: ModelSpec, rank: int) -> list[int]:
    """The layers that report attention spread. Rank 0 holds query head 0 at every world size, so the signal does not
    depend on the layout."""
    return sorted({spec.layers // 4, spec.layers // 2, 3 * spec.layers // 4}) if rank == 0 else []


class TorchDecoder:
    """A `Decoder` for every device and type."""

    def __init__(self, spec: ModelSpec, plan: ShardPlan, weights: Weights, group: Group, rotary: Rotary) -> None:
        self._spec = spec
        self._plan = plan
        self._weights = weights
        self._group = group
        self._rotary = rotary
        self._signal_layers = signal_layers(spec, group.rank)

    def run(self, step: StepInput, cache: KvCache) -> tuple[Tensor, Tensor | None]:
        """See `Decoder`."""
        x = self._embed(step.ids)
        attention = PagedAttention(cache, step)
        angles = self._rotary.angles(step.positions, x.dtype)
        spreads: list[Tensor] = []
        for i, layer in enumerate(self._weights.layers):
            q, k, v = self._project(layer, x, step, angles)
            mixed = attention.forward(i, q, k, v).reshape(x.shape[0], -1)
            if i in self._signal_layers:
                spreads.append(attention.head_spread(i, q))
            x = x + self._group.sum_(layer.output.forward(mixed, step.segments))
            x = x + self._mlp(layer, x, step)
        return x, torch.stack(spreads).mean(dim=0) if spreads else None

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """See `Decoder`."""
        return self._weights.head.times(self._norm_of(x[rows], self._weights.norm)).float()

    def _embed(self, ids: Tensor) -> Tensor:
        table, dtype = self._weights.embedding, self._weights.norm.dtype
        if self._group.world_size == 1:
            return table.rows(ids, dtype)
        local = ids - self._plan.vocab.start
        mine = (local >= 0) & (local < table.shape[0])
        return self._group.sum_(table.rows(local.where(mine, 0), dtype).masked_fill_(~mine[:, None], 0.0))

    def _norm_of(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self._spec.hidden,), weight, self._spec.norm_eps)

    def _project(
        self, layer: Layer, x: Tensor, step: StepInput, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan, dim = self._plan, self._spec.head_dim
        qkv = layer.qkv.forward(self._norm_of(x, layer.input_norm), step.segments)
        heads = qkv.view(x.shape[0], -1, dim)
        q, k, v = torch.split(heads, [plan.n_heads, plan.n_kv_heads, plan.n_kv_heads], dim=1)
        return rotate(q, *angles), rotate(k, *angles), v

    def _mlp(self, layer: Layer, x: Tensor, step: StepInput) -> Tensor:
        gate_up = layer.gate_up.forward(self._norm_of(x, layer.mlp_norm), step.segments)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._group.sum_(layer.down.forward(F.silu(gate) * up, step.segments))

"""Tensor parallelism: which part of every matrix a rank holds, and the three collectives that join the parts.

Attention is split by KV group: a rank holds whole KV heads with their query heads. Where the groups do not divide, the
first ranks hold one more. With more ranks than KV heads, KV heads are replicated and their query heads divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from chunkwise.core import UnsupportedModel
from chunkwise.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The half-open ranges of one rank: query heads, KV heads, MLP columns and vocabulary rows."""

    heads: slice
    kv_heads: slice
    mlp: slice
    vocab: slice

    @property
    def n_heads(self) -> int:
        """Query heads of this rank."""
        return int(self.heads.stop - self.heads.start)

    @property
    def n_kv_heads(self) -> int:
        """KV heads of this rank."""
        return int(self.kv_heads.stop - self.kv_heads.start)


def split(total: int, parts: int, index: int) -> slice:
    """Part ``index`` of ``total`` in ``parts`` contiguous parts of sizes that differ by at most 1, larger first."""
    size, rest = divmod(total, parts)
    start = index * size + min(index, rest)
    return slice(start, start + size + (index < rest))


def plan_shard(spec: ModelSpec, rank: int, world_size: int) -> ShardPlan:
    """The ranges of ``rank``.

    Raises:
        UnsupportedModel: more ranks than query heads, MLP columns or vocabulary rows.
    """
    for name, total in (("attention heads", spec.heads), ("MLP columns", spec.intermediate), ("words", spec.vocab)):
        if world_size > total:
            raise UnsupportedModel(f"{world_size} shards cannot divide {total} {name}; use at most {total} shards")
    if world_size <= spec.kv_heads:
        kv = split(spec.kv_heads, world_size, rank)
        heads = slice(kv.start * spec.group, kv.stop * spec.group)
    else:
        # Ranks are dealt to KV heads as evenly as they go; the ranks of one KV head share its query heads.
        for head in range(spec.kv_heads):
            ranks = split(world_size, spec.kv_heads, head)
            if ranks.start <= rank < ranks.stop:
                if ranks.stop - ranks.start > spec.group:
                    raise UnsupportedModel(
                        f"{world_size} shards need {ranks.stop - ranks.start} shards per KV head, but each of the "
                        f"{spec.kv_heads} KV heads has {spec.group} query heads; use fewer shards"
                    )
                part = split(spec.group, ranks.stop - ranks.start, rank - ranks.start)
                kv = slice(head, head + 1)
                heads = slice(head * spec.group + part.start, head * spec.group + part.stop)
    mlp, vocab = split(spec.intermediate, world_size, rank), split(spec.vocab, world_size, rank)
    return ShardPlan(heads, kv, mlp, vocab)


class Group(Protocol):
    """The ranks that compute one model together. Every rank calls every method in the same order."""

    rank: int
    world_size: int

    def sum_(self, x: Tensor) -> Tensor:
        """Adds ``x`` over all ranks, in place, and returns it; the bits are the same on every rank."""
        ...

    def gather_columns(self, x: Tensor, total: int) -> Tensor:
        """Joins the ranks' ``[rows, columns]`` parts (sized by `split`) to ``[rows, total]``."""
        ...

    def minimum(self, value: int) -> int:
        """The smallest ``value`` of all ranks."""
        ...

    def first(self, value: int) -> int:
        """The ``value`` of rank 0."""
        ...


class SingleProcess:
    """The group of one."""

    rank = 0
    world_size = 1

    def sum_(self, x: Tensor) -> Tensor:
        """As in `Group`."""
        return x

    def gather_columns(self, x: Tensor, total: int) -> Tensor:
        """As in `Group`."""
        return x

    def minimum(self, value: int) -> int:
        """As in `Group`."""
        return value

    def first(self, value: int) -> int:
        """As in `Group`."""
        return value


class DistributedGroup:
    """A group over torch.distributed: gloo on CPU, nccl on GPU.

    Args:
        address: ``host:port`` where rank 0 listens.
        timeout_seconds: how long a collective may wait for a rank before the process fails.
    """

    def __init__(self, rank: int, world_size: int, address: str, device: torch.device, timeout_seconds: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def sum_(self, x: Tensor) -> Tensor:
        """As in `Group`."""
        dist.all_reduce(x)
        return x

    def gather_columns(self, x: Tensor, total: int) -> Tensor:
        """As in `Group`. Parts are padded to the widest, because all_gather wants equal sizes."""
        widest = split(total, self.world_size, 0)
        padded = x.new_zeros(x.shape[0], widest.stop)
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        sizes = [split(total, self.world_size, r) for r in range(self.world_size)]
        return torch.cat([part[:, : s.stop - s.start] for part, s in zip(parts, sizes, strict=True)], dim=1)

    def minimum(self, value: int) -> int:
        """As in `Group`."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def first(self, value: int) -> int:
        """As in `Group`."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.broadcast(tensor, src=0)
        return int(tensor.item())

    def close(self) -> None:
        """Leaves the group."""
        dist.destroy_process_group()

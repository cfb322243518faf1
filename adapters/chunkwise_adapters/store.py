"""Adapters resident on one device: the shard's slices of their ladders, in the model's type, found by name.

It does not know who uses an adapter: a removed one lives on for as long as somebody holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkwise_adapters.arena import Arena
from chunkwise_adapters.format import TARGETS, AdapterConflict, AdapterNotFound, ModuleKey
from chunkwise_adapters.ladder import LadderInfo, RankLadder


@dataclass(frozen=True, slots=True)
class TargetSlice:
    """The part of a target's matrix [out, in] that this shard computes.

    Column-parallel targets (q, k, v, gate, up) slice ``out``: A is replicated, B sliced. Row-parallel targets (o, down)
    slice ``inp``: A is sliced, B replicated, and the shards' outputs are summed with the base's. The rank dimension is
    never sliced, because a prefix of it must be whole on every shard.
    """

    out: slice
    inp: slice


@dataclass(frozen=True, slots=True, eq=False)
class ResidentModule:
    """One module's nested factors on the device: ``a`` [R, in_local], ``b_t`` [R, out_local], contiguous, and
    its active rank at each of the adapter's rungs."""

    a: Tensor
    b_t: Tensor
    active_ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ResidentAdapter(LadderInfo):
    """A ladder's local slices, ready to apply. Never changes, so a step may keep using one that was removed."""

    modules: dict[ModuleKey, ResidentModule]

    @property
    def bytes(self) -> int:
        """Device memory of the factors."""
        return sum(module.a.nbytes + module.b_t.nbytes for module in self.modules.values())


class AdapterStore:
    """The resident adapters of one shard, by name. ``slices`` gives this shard's part of every target (None: all)."""

    def __init__(self, slices: Mapping[str, TargetSlice] | None, dtype: torch.dtype, device: torch.device) -> None:
        assert slices is None or set(slices) == set(TARGETS), f"slices must name every target of {TARGETS}"
        whole = TargetSlice(slice(None), slice(None))
        self._slices = dict.fromkeys(TARGETS, whole) if slices is None else dict(slices)
        self._dtype = dtype
        self._device = device
        self._adapters: dict[str, ResidentAdapter] = {}

    def add(self, ladder: RankLadder) -> ResidentAdapter:
        """Make a ladder resident under its name. Adding the same one again returns the resident adapter.

        Raises:
            AdapterConflict: the name is resident with other weights or another ladder.
        """
        resident = self._adapters.get(ladder.name)
        if resident is not None:
            self._check_same(resident, ladder)
            return resident
        modules: dict[ModuleKey, ResidentModule] = {}
        # Of its own, so that its memory goes when the adapter does.
        arena = Arena()
        for key, module in ladder.modules.items():
            part = self._slices[key[1]]
            modules[key] = ResidentModule(
                a=self._place(module.a[:, part.inp], arena),
                b_t=self._place(module.b_t[:, part.out], arena),
                active_ranks=ladder.active_ranks[key],
            )
        resident = ResidentAdapter(
            name=ladder.name,
            content_hash=ladder.content_hash,
            trained_rank=ladder.trained_rank,
            rungs=ladder.rungs,
            kept_energy=ladder.kept_energy,
            mean_active_rank=ladder.mean_active_rank,
            modules=modules,
        )
        self._adapters[ladder.name] = resident
        return resident

    def get(self, name: str) -> ResidentAdapter:
        """The resident adapter ``name``. Raises AdapterNotFound."""
        try:
            return self._adapters[name]
        except KeyError:
            raise AdapterNotFound(f"adapter {name!r} is not resident; resident are {list(self.names())}") from None

    def remove(self, name: str) -> None:
        """Forget the adapter ``name``; its memory is freed when no step holds it any more. Raises AdapterNotFound."""
        self.get(name)
        del self._adapters[name]

    def names(self) -> tuple[str, ...]:
        """The names of the resident adapters, sorted."""
        return tuple(sorted(self._adapters))

    def infos(self) -> tuple[LadderInfo, ...]:
        """The ladders of the resident adapters, in the order of `names`."""
        return tuple(self._adapters[name] for name in self.names())

    def _place(self, factor: Tensor, arena: Arena) -> Tensor:
        if self._device.type == "cpu":
            return arena.empty(factor.shape[0], factor.shape[1], self._dtype).copy_(factor)
        return factor.to(self._device, self._dtype).contiguous()

    @staticmethod
    def _check_same(resident: ResidentAdapter, ladder: RankLadder) -> None:
        if resident.content_hash != ladder.content_hash:
            raise AdapterConflict(
                f"adapter {ladder.name!r} is resident with content {resident.content_hash[:12]}, not "
                f"{ladder.content_hash[:12]}; remove it first or choose another name"
            )
        active_ranks = {key: module.active_ranks for key, module in resident.modules.items()}
        before = (resident.rungs, active_ranks, resident.kept_energy)
        if before != (ladder.rungs, ladder.active_ranks, ladder.kept_energy):
            raise AdapterConflict(
                f"adapter {ladder.name!r} is resident with another ladder, of rungs {resident.rungs}; "
                f"remove it first to use rungs {ladder.rungs}"
            )

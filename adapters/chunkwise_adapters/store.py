"""Adapters on one device: the shard's slices of their ladders, in the model's type, found by name.

It does not know who uses an adapter: one that is removed or evicted lives on for as long as somebody holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from weakref import WeakValueDictionary

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


@dataclass(frozen=True, slots=True)
class _Offer:
    """What is known of an adapter, and how to read it again once it has been evicted."""

    info: LadderInfo
    active_ranks: dict[ModuleKey, tuple[int, ...]]
    load: Callable[[], RankLadder] | None


class AdapterStore:
    """The adapters of one shard, by name.

    Args:
        slices: this shard's part of every target (None: all).
        slots: the most adapters that stay resident (None: all). For one more, the one least recently asked for makes
            room; those that requests hold beyond that stay until the requests end.
    """

    def __init__(
        self,
        slices: Mapping[str, TargetSlice] | None,
        dtype: torch.dtype,
        device: torch.device,
        slots: int | None = None,
    ) -> None:
        assert slices is None or set(slices) == set(TARGETS), f"slices must name every target of {TARGETS}"
        whole = TargetSlice(slice(None), slice(None))
        self._slices = dict.fromkeys(TARGETS, whole) if slices is None else dict(slices)
        self._dtype = dtype
        self._device = device
        self._slots = slots
        self._offers: dict[str, _Offer] = {}
        # In the order in which they were last asked for.
        self._adapters: dict[str, ResidentAdapter] = {}
        self._alive: WeakValueDictionary[str, ResidentAdapter] = WeakValueDictionary()

    def add(self, ladder: RankLadder, load: Callable[[], RankLadder] | None = None) -> ResidentAdapter:
        """Make a ladder resident under its name. Adding the same one again returns the resident adapter.

        Args:
            load: reads the same ladder again; without it the adapter is never evicted.

        Raises:
            AdapterConflict: the name is known with other weights or another ladder.
        """
        offer = self._offers.get(ladder.name)
        if offer is not None:
            self._check_same(offer, ladder)
            return self.get(ladder.name)
        resident = self._slice(ladder)
        info = LadderInfo(*(getattr(resident, field.name) for field in fields(LadderInfo)))
        self._offers[ladder.name] = _Offer(info, ladder.active_ranks, load)
        self._keep(resident)
        return resident

    def get(self, name: str) -> ResidentAdapter:
        """The adapter ``name``, read again if it is not resident.

        Raises:
            AdapterNotFound: no such adapter is known.
            AdapterError: it cannot be read any more.
            AdapterConflict: what was read is not what was added.
        """
        resident = self._adapters.pop(name, None) or self._alive.get(name)
        if resident is None:
            offer = self._offers.get(name)
            if offer is None or offer.load is None:
                raise AdapterNotFound(f"adapter {name!r} is not known; known are {list(self.names())}")
            ladder = offer.load()
            self._check_same(offer, ladder)
            resident = self._slice(ladder)
        self._keep(resident)
        return resident

    def _keep(self, adapter: ResidentAdapter) -> None:
        self._adapters[adapter.name] = self._alive[adapter.name] = adapter
        evictable = [name for name in self._adapters if self._offers[name].load is not None]
        surplus = 0 if self._slots is None else len(self._adapters) - self._slots
        for name in evictable[: max(surplus, 0)]:
            del self._adapters[name]

    def _slice(self, ladder: RankLadder) -> ResidentAdapter:
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
        return ResidentAdapter(
            name=ladder.name,
            content_hash=ladder.content_hash,
            trained_rank=ladder.trained_rank,
            rungs=ladder.rungs,
            kept_energy=ladder.kept_energy,
            mean_active_rank=ladder.mean_active_rank,
            modules=modules,
        )

    def remove(self, name: str) -> None:
        """Forget the adapter ``name``; its memory is freed when no step holds it any more. Raises AdapterNotFound."""
        if name not in self._offers:
            raise AdapterNotFound(f"adapter {name!r} is not known; known are {list(self.names())}")
        del self._offers[name]
        self._adapters.pop(name, None)
        self._alive.pop(name, None)

    @property
    def evicts(self) -> bool:
        """Whether adapters may have to be read again."""
        return self._slots is not None

    def names(self) -> tuple[str, ...]:
        """The names of all adapters, sorted."""
        return tuple(sorted(self._offers))

    def resident(self) -> tuple[str, ...]:
        """The names of those that are in memory for the next request, sorted."""
        return tuple(sorted(self._adapters))

    def infos(self) -> tuple[LadderInfo, ...]:
        """What is known of all adapters, in the order of `names`."""
        return tuple(self._offers[name].info for name in self.names())

    def _place(self, factor: Tensor, arena: Arena) -> Tensor:
        if self._device.type == "cpu":
            return arena.empty(factor.shape[0], factor.shape[1], self._dtype).copy_(factor)
        return factor.to(self._device, self._dtype).contiguous()

    @staticmethod
    def _check_same(offer: _Offer, ladder: RankLadder) -> None:
        known = offer.info
        if known.content_hash != ladder.content_hash:
            raise AdapterConflict(
                f"adapter {ladder.name!r} is known with content {known.content_hash[:12]}, not "
                f"{ladder.content_hash[:12]}; remove it first or choose another name"
            )
        before = (known.rungs, offer.active_ranks, known.kept_energy)
        if before != (ladder.rungs, ladder.active_ranks, ladder.kept_energy):
            raise AdapterConflict(
                f"adapter {ladder.name!r} is known with another ladder, of rungs {known.rungs}; "
                f"remove it first to use rungs {ladder.rungs}"
            )

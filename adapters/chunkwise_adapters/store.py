"""Adapters on one device: the shard's slices of their ladders, in the model's type, found by name.

It does not know who uses an adapter: one that is removed or evicted lives on for as long as somebody holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from chunkwise_adapters.arena import Arena
from chunkwise_adapters.format import TARGETS, AdapterConflict, AdapterNotFound, ModuleKey
from chunkwise_adapters.ladder import LadderInfo, RankLadder
from chunkwise_adapters.spill import SpillFile

logger = logging.getLogger(__name__)


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


class Source(Protocol):
    """Where an adapter's ladder comes from."""

    def read(self) -> RankLadder:
        """Read and check it. Raises AdapterError or OSError."""

    def unchanged(self) -> bool:
        """Whether nothing was done to the files since `read` last succeeded. Raises AdapterError or OSError."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """What is known of an adapter, and how to get it again once it has been evicted."""

    info: LadderInfo
    active_ranks: dict[ModuleKey, tuple[int, ...]]
    shapes: dict[ModuleKey, tuple[torch.Size, torch.Size]]
    source: Source | None


class AdapterStore:
    """The adapters of one shard, by name.

    Args:
        slices: this shard's part of every target (None: all).
        slots: the most adapters that stay resident (None: all). For one more, the one least recently asked for makes
            room; those that requests hold beyond that stay until the requests end.
        spill: directory for a file that holds what was evicted, for as long as the adapter's source is unchanged (None:
            evicted adapters are read and checked anew).
    """

    def __init__(
        self,
        slices: Mapping[str, TargetSlice] | None,
        dtype: torch.dtype,
        device: torch.device,
        slots: int | None = None,
        spill: Path | None = None,
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
        self._spill_file = None if slots is None or spill is None else _open_spill(spill)
        self._spilled: dict[str, int] = {}

    def add(self, ladder: RankLadder, source: Source | None = None) -> ResidentAdapter:
        """Make a ladder resident under its name. Adding the same one again returns the resident adapter.

        Args:
            source: what the ladder was read from; without it the adapter is never evicted.

        Raises:
            AdapterConflict: the name is known with other weights or another ladder.
        """
        offer = self._offers.get(ladder.name)
        if offer is not None:
            self._check_same(offer, ladder)
            return self.get(ladder.name)
        resident = self._slice(ladder)
        info = LadderInfo(*(getattr(resident, field.name) for field in fields(LadderInfo)))
        shapes = {key: (module.a.shape, module.b_t.shape) for key, module in resident.modules.items()}
        self._offers[ladder.name] = _Offer(info, ladder.active_ranks, shapes, source)
        self._keep(resident)
        return resident

    def get(self, name: str) -> ResidentAdapter:
        """The adapter ``name``, brought back if it is not resident.

        Raises:
            AdapterNotFound: no such adapter is known.
            AdapterError: it cannot be read any more.
            AdapterConflict: what was read is not what was added.
            OSError: the file of evicted adapters cannot be read.
        """
        resident = self._adapters.pop(name, None) or self._alive.get(name)
        if resident is None:
            offer = self._offers.get(name)
            if offer is None or offer.source is None:
                raise AdapterNotFound(f"adapter {name!r} is not known; known are {list(self.names())}")
            resident = self._bring_back(offer, offer.source)
        self._keep(resident)
        return resident

    def _keep(self, adapter: ResidentAdapter) -> None:
        self._adapters[adapter.name] = self._alive[adapter.name] = adapter
        evictable = [name for name in self._adapters if self._offers[name].source is not None]
        surplus = 0 if self._slots is None else len(self._adapters) - self._slots
        for name in evictable[: max(surplus, 0)]:
            self._spill(self._adapters.pop(name))

    def _spill(self, adapter: ResidentAdapter) -> None:
        if self._spill_file is None or adapter.name in self._spilled:
            return
        factors = chain.from_iterable((module.a, module.b_t) for module in adapter.modules.values())
        try:
            self._spilled[adapter.name] = self._spill_file.write(factors)
        except OSError as error:
            logger.warning("adapter %r is read and checked anew when asked for: %s", adapter.name, error)

    def _bring_back(self, offer: _Offer, source: Source) -> ResidentAdapter:
        name = offer.info.name
        offset = self._spilled.get(name)
        if self._spill_file is None or offset is None or not source.unchanged():
            # Until the check: files that were refused have been read, and look unchanged the next time.
            self._spilled.pop(name, None)
            ladder = source.read()
            self._check_same(offer, ladder)
            if offset is not None:
                self._spilled[name] = offset
            return self._slice(ladder)
        arena = Arena()
        factors = {
            key: (arena.empty(a[0], a[1], self._dtype), arena.empty(b_t[0], b_t[1], self._dtype))
            for key, (a, b_t) in offer.shapes.items()
        }
        self._spill_file.read(offset, chain.from_iterable(factors.values()))
        return _resident(
            offer.info,
            {
                key: ResidentModule(a.to(self._device), b_t.to(self._device), offer.active_ranks[key])
                for key, (a, b_t) in factors.items()
            },
        )

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
        return _resident(ladder, modules)

    def remove(self, name: str) -> None:
        """Forget the adapter ``name``; its memory is freed when no step holds it any more. Raises AdapterNotFound."""
        if name not in self._offers:
            raise AdapterNotFound(f"adapter {name!r} is not known; known are {list(self.names())}")
        del self._offers[name]
        self._adapters.pop(name, None)
        self._alive.pop(name, None)
        self._spilled.pop(name, None)

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


def _resident(info: LadderInfo, modules: dict[ModuleKey, ResidentModule]) -> ResidentAdapter:
    return ResidentAdapter(
        name=info.name,
        content_hash=info.content_hash,
        trained_rank=info.trained_rank,
        rungs=info.rungs,
        kept_energy=info.kept_energy,
        mean_active_rank=info.mean_active_rank,
        modules=modules,
    )


def _open_spill(directory: Path) -> SpillFile | None:
    try:
        return SpillFile(directory)
    except OSError as error:
        logger.warning("no file for evicted adapters, they are read and checked anew when asked for: %s", error)
        return None

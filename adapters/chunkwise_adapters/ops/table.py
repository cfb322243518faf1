"""What the GPU kernels read instead of Python objects: a step's tokens in tiles, and factors as addresses.

One table serves all modules of a step. It knows nothing of Triton; `triton` launches over it.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chunkwise_adapters.format import TARGETS, ModuleKey
from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.store import ResidentAdapter

Entries = NDArray[np.int64]

_RANKS_AT = 2  # an entry of the factor table is: address of a, address of b_t, active rank at rung 0, 1, …
_ALIGNMENT = 16  # bytes; torch's CUDA allocator gives 512, and the kernels' wide loads rely on these


class Capacity(NamedTuple):
    """The most that a table can hold: ``tiles`` of at most ``tile_rows`` tokens, ``rows`` tokens in all, active ranks
    up to ``rank``, ``adapters`` with up to ``rungs`` rungs, ``modules`` as counted by `module_index`."""

    tile_rows: int
    tiles: int
    rows: int
    rank: int
    adapters: int
    rungs: int
    modules: int

    def fits(self, needed: Capacity) -> bool:
        """Whether a step that needs ``needed`` fits. Tiles must be of one size."""
        pairs = zip(self[1:], needed[1:], strict=True)
        return self.tile_rows == needed.tile_rows and all(most >= n for most, n in pairs)


def module_index(key: ModuleKey) -> int:
    """The place of a module in the factor table: the same for every adapter."""
    return key[0] * len(TARGETS) + TARGETS.index(key[1])


def describe(adapter: ResidentAdapter) -> Entries:
    """An adapter's rows of the factor table, ``[modules, 2 + rungs]``; a module that it lacks has rank 0. The addresses
    are good for as long as the adapter lives."""
    modules = 1 + max(map(module_index, adapter.modules), default=-1)
    entries = np.zeros((modules, _RANKS_AT + len(adapter.rungs)), dtype=np.int64)
    for key, module in adapter.modules.items():
        assert module.a.is_contiguous() and module.b_t.is_contiguous(), "the store makes factors contiguous"
        entries[module_index(key)] = (module.a.data_ptr(), module.b_t.data_ptr(), *module.active_ranks)
    assert not (entries[:, :_RANKS_AT] % _ALIGNMENT).any(), f"factors must start at multiples of {_ALIGNMENT} bytes"
    return entries


class StepPlan(NamedTuple):
    """A step's segments as arrays on the host, which a table of capacity ``needs`` or more holds.

    ``tiles`` int32 [T, 4]: first row, rows, adapter slot, widest rung. ``rows`` int32 [n], the tokens' rows in the
    step's input, segment after segment; those of ``indexed`` segments (start in ``rows``, indices) are on the device
    already and are left out. ``rungs`` int32 [n, 2] and ``weights`` fp32 [n, 2] are the two parts of each token's gate.
    """

    needs: Capacity
    tiles: NDArray[np.int32]
    rows: NDArray[np.int32]
    rungs: NDArray[np.int32]
    weights: NDArray[np.float32]
    indexed: tuple[tuple[int, Tensor], ...]
    adapters: tuple[ResidentAdapter, ...]
    entries: tuple[Entries, ...]


def plan_step(
    segments: Sequence[LoraSegment], tile_rows: int, described: MutableMapping[ResidentAdapter, Entries]
) -> StepPlan:
    """Cut segments into tiles. Adapters that ``described`` lacks are added to it. Reads nothing from the device."""
    slots: dict[ResidentAdapter, int] = {}
    tiles: list[tuple[int, int, int, int]] = []
    rows: list[NDArray[np.int32]] = []
    indexed: list[tuple[int, Tensor]] = []
    first = rank = 0
    for segment in segments:
        slot = slots.setdefault(segment.adapter, len(slots))
        if segment.adapter not in described:
            described[segment.adapter] = describe(segment.adapter)
        rank = max(rank, int(described[segment.adapter][:, _RANKS_AT + segment.rung].max(initial=0)))
        n = sum(run.n_tokens for run in segment.runs)
        if isinstance(segment.rows, slice):
            rows.append(np.arange(segment.rows.start, segment.rows.stop, dtype=np.int32))
        else:
            rows.append(np.zeros(n, dtype=np.int32))
            indexed.append((first, segment.rows))
        tiles += [(first + at, min(tile_rows, n - at), slot, segment.rung) for at in range(0, n, tile_rows)]
        first += n
    runs = np.array([run for segment in segments for run in segment.runs], dtype=np.float64).reshape(-1, 5)
    gates = np.repeat(runs, runs[:, 0].astype(np.intp), axis=0)
    entries = tuple(described[adapter] for adapter in slots)
    rungs = max((rows_of.shape[1] - _RANKS_AT for rows_of in entries), default=0)
    modules = max(map(len, entries), default=0)
    return StepPlan(
        Capacity(tile_rows, len(tiles), first, rank, len(slots), rungs, modules),
        np.array(tiles, dtype=np.int32).reshape(-1, 4),
        np.concatenate(rows or [np.zeros(0, dtype=np.int32)]),
        gates[:, [1, 3]].astype(np.int32),
        gates[:, [2, 4]].astype(np.float32),
        tuple(indexed),
        tuple(slots),
        entries,
    )


class StepTable:
    """A `StepPlan` on the device, at addresses that never change; `load` replaces the contents. Keeps the adapters
    of the last load alive.

    ``tiles`` int32 [tiles, 4]; a tile without rows does nothing. ``rows`` int32 [rows]; ``rungs`` int32 [rows, 2];
    ``weights`` fp32 [rows, 2]; ``factors`` int64 [modules, adapters, 2 + rungs].
    """

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self.capacity = capacity
        self._sizes = [4 * capacity.tiles, capacity.rows, 2 * capacity.rows, 2 * capacity.rows]
        self._buffer = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        tiles, self.rows, rungs, weights = torch.split(self._buffer, self._sizes)
        self.tiles, self.rungs = tiles.view(-1, 4), rungs.view(-1, 2)
        self.weights = weights.view(torch.float32).view(-1, 2)
        width = _RANKS_AT + capacity.rungs
        self.factors = torch.zeros((capacity.modules, capacity.adapters, width), dtype=torch.int64, device=device)
        self._adapters: tuple[ResidentAdapter, ...] = ()

    def load(self, plan: StepPlan) -> None:
        """Replace the contents: one copy for the tokens, another if the adapters are not those of the last load."""
        assert self.capacity.fits(plan.needs), f"{plan.needs} does not fit {self.capacity}"
        parts = (plan.tiles, plan.rows, plan.rungs, plan.weights.view(np.int32))
        host = np.zeros(sum(self._sizes), dtype=np.int32)
        at = 0
        for part, size in zip(parts, self._sizes, strict=True):
            host[at : at + part.size] = part.reshape(-1)
            at += size
        self._buffer.copy_(torch.from_numpy(host))
        for start, rows in plan.indexed:
            self.rows[start : start + len(rows)].copy_(rows)
        if plan.adapters != self._adapters:
            factors = np.zeros(tuple(self.factors.shape), dtype=np.int64)
            for slot, entries in enumerate(plan.entries):
                factors[: len(entries), slot, : entries.shape[1]] = entries
            self.factors.copy_(torch.from_numpy(factors))
            self._adapters = plan.adapters

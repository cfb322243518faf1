"""Chunks become gates: which tokens of a step use which adapter, at which active rank and with which weights.

A token's gate is the vector ``g ∈ R^r`` of ``y = W x + B'(g ⊙ (A' x))``. In a chunk of rung k and scale s it is
``s·[1]*k ++ [0]*(r-k)``. Over the first w tokens of a chunk, token j has ``α·(this chunk's gate) + (1-α)·(the previous
chunk's gate)`` with ``α = (j+1)/(w+1)``: since rungs are nested, that is the linear mixture of the two rungs' outputs.
This module knows neither the factors nor where chunks come from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from chunkwise_adapters.store import ResidentAdapter

_START = attrgetter("start")


class GateChunk(Protocol):
    """Opens a chunk at position ``start``, which lasts until the next one's start. ``rung`` None is full rank;
    ``scale`` multiplies the adapter's output; ``crossfade`` is the window w in tokens."""

    @property
    def start(self) -> int: ...
    @property
    def rung(self) -> float | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def crossfade(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class GatedSpan:
    """Consecutive tokens of one sequence in a step: rows ``first_row .. first_row + n_tokens`` of the step's input, of
    which the first is at ``position`` in the sequence.

    ``chunks`` ascend strictly by start and must reach back to the chunk before the one that holds ``position``. Tokens
    before the first chunk have full rank and scale 1, and so has its predecessor in a cross-fade; only a chunk that
    opens the sequence at position 0 has no predecessor and is not cross-faded.
    """

    first_row: int
    n_tokens: int
    position: int
    adapter: ResidentAdapter
    chunks: Sequence[GateChunk]


class GateRun(NamedTuple):
    """Consecutive rows with one gate: ``weight`` on the prefix of rung index ``rung`` plus ``previous_weight`` on that
    of ``previous_rung``. A weight of 0 means that this part of the gate is absent."""

    n_tokens: int
    rung: int
    weight: float
    previous_rung: int
    previous_weight: float


@dataclass(frozen=True, slots=True, eq=False)
class LoraSegment:
    """The tokens of a step that use one adapter up to one rung.

    ``rows`` selects them in the step's input; ``rung`` is the index of the widest rung that any of them needs;
    ``runs`` are their gates, in the order of ``rows``.
    """

    adapter: ResidentAdapter
    rows: slice | Tensor
    rung: int
    runs: tuple[GateRun, ...]
    device: torch.device
    _gates: dict[tuple[int, ...], Tensor | None] = field(default_factory=dict, repr=False)

    def gate(self, active_ranks: tuple[int, ...]) -> Tensor | None:
        """Gates [n, k] in fp32 of a module with these active ranks per rung, where k is its rank at ``rung``; None when
        all are 1. Modules with equal ranks share one tensor, so a uniform ladder computes it once per step."""
        if active_ranks not in self._gates:
            self._gates[active_ranks] = self._compute(active_ranks)
        return self._gates[active_ranks]

    @property
    def plain(self) -> bool:
        """Whether every token has the whole of the rung, at weight 1."""
        return all(run.rung == self.rung and run.weight == 1.0 and run.previous_weight == 0.0 for run in self.runs)

    def row_numbers(self) -> Sequence[int]:
        """``rows`` as numbers, in order."""
        if isinstance(self.rows, slice):
            return range(self.rows.start, self.rows.stop)
        numbers: list[int] = self.rows.tolist()
        return numbers

    def _compute(self, active_ranks: tuple[int, ...]) -> Tensor | None:
        if self.plain:
            return None
        ranks = np.array(active_ranks)
        columns = np.arange(active_ranks[self.rung])
        runs = np.array(self.runs, dtype=np.float64)
        rank, previous_rank = ranks[runs[:, 1].astype(np.intp)], ranks[runs[:, 3].astype(np.intp)]
        gates = runs[:, 2, None] * (columns < rank[:, None]) + runs[:, 4, None] * (columns < previous_rank[:, None])
        gates = gates.astype(np.float32)
        if (gates == 1.0).all():
            return None
        return torch.from_numpy(np.repeat(gates, runs[:, 0].astype(np.intp), axis=0)).to(self.device)


def build_segments(spans: Sequence[GatedSpan], device: torch.device) -> tuple[LoraSegment, ...]:
    """Group the tokens of a step by adapter and widest rung needed; a token that needs rank 0 is in no segment.

    Costs O(tokens) only inside cross-fade windows, O(chunks touched) elsewhere.

    Raises:
        InvalidRung: a chunk names a rung that its adapter does not have.
    """
    groups: dict[tuple[ResidentAdapter, int], tuple[list[tuple[int, int]], list[GateRun]]] = {}
    for span in spans:
        row = span.first_row
        for run in _runs(span):
            rungs = [rung for rung, weight in ((run[1], run[2]), (run[3], run[4])) if weight != 0.0]
            if rungs:
                rows, runs = groups.setdefault((span.adapter, max(rungs)), ([], []))
                rows.append((row, row + run.n_tokens))
                runs.append(run)
            row += run.n_tokens
    return tuple(
        LoraSegment(adapter, _select(rows, device), rung, tuple(runs), device)
        for (adapter, rung), (rows, runs) in groups.items()
    )


def gate_key(span: GatedSpan) -> tuple[GateRun, ...]:
    """The gates of a span as a value: spans with equal keys on the same adapter are gated alike. ``first_row`` does not
    count. Raises InvalidRung as `build_segments`."""
    return tuple(_runs(span))


def _select(rows: list[tuple[int, int]], device: torch.device) -> slice | Tensor:
    """The ranges of ``rows`` as one slice where they join without gaps, else as indices."""
    if all(before[1] == after[0] for before, after in pairwise(rows)):
        return slice(rows[0][0], rows[-1][1])
    return torch.tensor([row for start, stop in rows for row in range(start, stop)], device=device)


def _runs(span: GatedSpan) -> Iterator[GateRun]:
    """The gates of a span, in order; their token counts add up to the span's."""
    chunks, position, end = span.chunks, span.position, span.position + span.n_tokens
    opened = bisect_right(chunks, position, key=_START)
    while position < end:
        stop = min(end, chunks[opened].start) if opened < len(chunks) else end
        for run in _window(span, opened, position, stop):
            yield run
            position += 1
        if position < stop:
            rung, weight = _steady(span, opened)
            yield GateRun(stop - position, rung, weight, rung, 0.0)
        position = stop
        opened += 1


def _window(span: GatedSpan, opened: int, position: int, stop: int) -> Iterator[GateRun]:
    """The tokens from ``position`` on, before ``stop``, in the cross-fade of the last of the ``opened`` chunks."""
    if opened == 0:
        return
    chunk = span.chunks[opened - 1]
    stop = min(stop, chunk.start + chunk.crossfade)
    if position >= stop or (opened == 1 and chunk.start == 0):
        return
    rung, weight = _steady(span, opened)
    previous_rung, previous_weight = _steady(span, opened - 1)
    if (rung, weight) == (previous_rung, previous_weight):
        return
    for token in range(position, stop):
        alpha = (token - chunk.start + 1) / (chunk.crossfade + 1)
        yield GateRun(1, rung, alpha * weight, previous_rung, (1.0 - alpha) * previous_weight)


def _steady(span: GatedSpan, opened: int) -> tuple[int, float]:
    """Rung index and weight once the first ``opened`` chunks have opened, away from cross-fades.

    Rung 0 gets weight 0, so that skipping the adapter looks the same by rank and by scale.
    """
    adapter = span.adapter
    if opened == 0:
        return len(adapter.rungs) - 1, 1.0
    chunk = span.chunks[opened - 1]
    rung = adapter.rung_index(chunk.rung)
    return rung, chunk.scale if adapter.rungs[rung] > 0 else 0.0

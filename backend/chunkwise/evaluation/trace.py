"""What the engine did with each sequence, read off the sequences themselves: gates as executed, pages as held.

Nothing here is taken from what steering intended. A sequence refuses decisions for computed positions, so the gates
that its decisions give its computed positions are those that the steps applied, and they are found by the function
that the steps use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from chunkwise.core import KvFormat, ShardState
from chunkwise.shard.sequence import Sequence
from chunkwise_adapters.gate import GatedSpan, GateRun, gate_key
from chunkwise_adapters.store import ResidentAdapter


class ExecutedChunk(NamedTuple):
    """A `core.ChunkDecision` that took effect; fields as there."""

    start: int
    rung: float | None
    scale: float
    crossfade: int


@dataclass(frozen=True, slots=True)
class Trace:
    """One sequence, as executed.

    ``rank_runs`` are (number of positions, active rank) over all computed positions from 0 on. The active rank of a
    position is what the adapter cost there: modules weighted by their size, see `active_ranks`. ``chunks`` are the
    decisions that took effect, in order. ``kv_bytes_mean``, ``kv_bytes_peak`` and ``kv_bytes_end`` (the last) are of
    the pages held after the step that completed the prompt and after every later one.
    """

    rank_runs: tuple[tuple[int, float], ...]
    chunks: tuple[ExecutedChunk, ...]
    kv_bytes_mean: float
    kv_bytes_peak: int
    kv_bytes_end: int

    @property
    def computed(self) -> int:
        """Positions that ran through the model."""
        return sum(count for count, _ in self.rank_runs)

    def ranks(self) -> list[float]:
        """The active rank of every computed position."""
        return [rank for count, rank in self.rank_runs for _ in range(count)]

    def rank_sum(self, start: int, end: int) -> float:
        """Sum of the active ranks of the computed positions in ``[start, end)``."""
        total, position = 0.0, 0
        for count, rank in self.rank_runs:
            total += rank * max(min(position + count, end) - max(position, start), 0)
            position += count
        return total


@dataclass(slots=True)
class _Watched:
    sequence: Sequence
    held: list[int] = field(default_factory=list)


class Watcher:
    """An observer for `Engine.watch`, and what it saw. ``state`` is the engine's.

    Attributes:
        pool_bytes: bytes of KV pages held by all sequences together, after every step.
    """

    def __init__(self, state: Callable[[], ShardState]) -> None:
        self._state = state
        self._watched: dict[int, _Watched] = {}
        self.pool_bytes: list[int] = []

    def __call__(self, sequences: SequenceOf[Sequence]) -> None:
        """Looks at the sequences of a step."""
        usage = self._state().kv
        self.pool_bytes.append(sum(kind.bytes for kind in usage))
        page_bytes = {kind.format: kind.bytes // kind.pages for kind in usage if kind.pages}
        for sequence in sequences:
            watched = self._watched.setdefault(sequence.request.id, _Watched(sequence))
            # How many steps a prompt takes depends on who shares them; from its end on it is one step per token.
            if sequence.generated > 0:
                watched.held.append(_held_bytes(sequence, page_bytes))

    def take(self, request_id: int) -> Trace:
        """The trace of a sequence that has ended; it is forgotten here."""
        watched = self._watched.pop(request_id)
        sequence, held = watched.sequence, watched.held
        return Trace(
            rank_runs=tuple(_rank_runs(sequence)),
            chunks=tuple(
                ExecutedChunk(chunk.start, chunk.rung, chunk.scale, chunk.crossfade)
                for chunk in sequence.chunks
                if chunk.start < sequence.computed
            ),
            kv_bytes_mean=sum(held) / len(held),
            kv_bytes_peak=max(held),
            kv_bytes_end=held[-1],
        )

    def forget(self) -> None:
        """Forgets sequences that were not taken."""
        self._watched.clear()


def active_ranks(adapter: ResidentAdapter) -> tuple[float, ...]:
    """Per rung, the rank that the adapter costs: ``Σ_m k_m (in_m + out_m) / Σ_m (in_m + out_m)`` over its modules m.

    A module of active rank k takes ``k (in + out)`` multiplications and weights per token, so equal numbers mean equal
    compute; on a uniform ladder it is the rung itself.
    """
    sizes = [module.a.shape[1] + module.b_t.shape[1] for module in adapter.modules.values()]
    active = [module.active_ranks for module in adapter.modules.values()]
    return tuple(
        sum(size * rank for size, rank in zip(sizes, ranks, strict=True)) / sum(sizes)
        for ranks in zip(*active, strict=True)
    )


def _rank_runs(sequence: Sequence) -> Iterator[tuple[int, float]]:
    if sequence.adapter is None:
        yield sequence.computed, 0.0
        return
    costs = active_ranks(sequence.adapter)
    runs = gate_key(GatedSpan(0, sequence.computed, 0, sequence.adapter, sequence.chunks))
    for rank, equal in groupby(runs, key=lambda run: costs[_widest(run)]):
        yield sum(run.n_tokens for run in equal), rank


def _widest(run: GateRun) -> int:
    """Index of the rung that a run's tokens cost: in a cross-fade the wider of the two, as in `build_segments`."""
    parts = ((run.rung, run.weight), (run.previous_rung, run.previous_weight))
    return max((rung for rung, weight in parts if weight != 0.0), default=0)


def _held_bytes(sequence: Sequence, page_bytes: dict[KvFormat, int]) -> int:
    return sum(page_bytes[page.format] for page in sequence.pages)

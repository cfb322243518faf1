"""What steering did to one request, as told to clients, logs and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from chunkwise.core import KvFormat


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """One chunk ``[start, end)``. ``rank`` is the rank averaged over the adapter's modules; without an adapter ``rung``
    is None and ``rank`` 0. ``kv`` is the format that the chunk's whole pages have been told to take so far, attention
    sinks excepted, and ``kv_dropped`` the share of them that has been given back, in [0, 1]."""

    start: int
    end: int
    rung: float | None
    rank: float
    scale: float
    crossfade: int
    complexity: float
    kv: KvFormat
    kv_dropped: float = 0.0


@dataclass(frozen=True, slots=True)
class SteeringReport:
    """All chunks of a request in order, tiling its computed tokens, and ``mean_rank``, the mean of their ranks weighted
    by their lengths (0 without tokens)."""

    chunks: tuple[ChunkReport, ...]
    mean_rank: float

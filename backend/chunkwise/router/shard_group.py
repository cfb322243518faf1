"""The tensor-parallel shards as the router sees them: one partner. Says what can be asked, not how it travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from chunkwise.config.settings import Limits
from chunkwise.core import (
    CachedBatch,
    GenerationFailed,
    GenerationRequest,
    ShardInfo,
    ShardState,
    SteeringUpdate,
    StepResult,
    StepSignals,
    WarmupLimits,
)


class ShardLost(GenerationFailed):
    """A shard cannot be reached, or its steering session has ended: the group must be started anew."""


class Shards(Protocol):
    """What the router asks of its shards. A call that fails on one shard fails: `GenerationFailed` with that shard's
    message, or `ShardLost`."""

    async def info(self) -> ShardInfo:
        """What the shards serve."""

    async def warmup(self, limits: Limits) -> WarmupLimits:
        """Agrees the token limits and sizes the KV cache."""

    async def prefill(
        self, requests: Sequence[GenerationRequest], batch_id: int, cached: CachedBatch | None, seq: int, step: int
    ) -> StepResult:
        """Admits requests into the cached batch, if any, and runs one step over all."""

    async def decode(
        self, batches: Sequence[CachedBatch], seq: int, step: int, may_have_ended: bool = False
    ) -> StepResult:
        """Runs one step over cached batches. Sent while the step before still runs, it waits for that one; then the
        batches ``may_have_ended``, and if all have, the result is empty."""

    async def filter_batch(self, batch_id: int, request_ids: Sequence[int], seq: int) -> CachedBatch:
        """Keeps the named requests of a cached batch."""

    async def clear_cache(self, batch_id: int | None, seq: int) -> None:
        """Forgets one cached batch, or all (None)."""

    async def health(self) -> tuple[ShardState, ...]:
        """What each shard holds, by rank. Answers while a step runs."""

    async def steer(self, update: SteeringUpdate) -> None:
        """Sends every shard the next steering update."""

    async def signals(self, step: int) -> StepSignals:
        """Waits for the signals of a step. Steps are asked for in ascending order; those left out are skipped."""

    async def close(self) -> None:
        """Closes all connections."""

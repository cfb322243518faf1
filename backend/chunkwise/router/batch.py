"""The live batch as the shards hold it: every RPC that changes it, each behind the steering barrier it needs.

It knows the ids in the batch and nothing of the requests behind them.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from chunkwise.core import CachedBatch, GenerationFailed, GenerationRequest, StepResult
from chunkwise.router.helm import Helm
from chunkwise.router.metrics import Metrics
from chunkwise.router.shard_group import Shards


class ShardBatch:
    """At most one batch is live, and at most one RPC is under way."""

    def __init__(
        self, shards: Shards, helm: Helm, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shards = shards
        self._helm = helm
        self._metrics = metrics
        self._clock = clock
        self._ids = itertools.count(1)
        self._cached: CachedBatch | None = None

    @property
    def request_ids(self) -> tuple[int, ...]:
        """Ids of the requests in the batch, in the shards' order."""
        return self._cached.request_ids if self._cached is not None else ()

    @property
    def current_tokens(self) -> int:
        """Tokens that the next step computes for the requests already in the batch."""
        return self._cached.current_tokens if self._cached is not None else 0

    async def step(self, admitted: Sequence[GenerationRequest]) -> StepResult:
        """Runs one step over the batch and those that join it, and meanwhile observes the signals of the step before.

        Raises:
            GenerationFailed: the step failed; call `clear` before the next one.
            ShardLost: the shards must be started anew.
        """
        method, launch = self._launch(admitted)
        began = self._clock()
        self._metrics.batch_count.inc(method)
        try:
            result = await self._helm.step(launch)
        except GenerationFailed:
            self._metrics.batch_failure.inc(method)
            raise
        self._metrics.step_done(method, self._clock() - began, result)
        self._cached = result.batch
        return result

    async def keep(self, live: Collection[int]) -> None:
        """Drops every request that is not ``live``, after the shards have seen all steering updates."""
        batch = self._cached
        if batch is None:
            return
        kept = tuple(request_id for request_id in batch.request_ids if request_id in live)
        if kept == batch.request_ids:
            return
        began = self._clock()
        await self._helm.flush()
        if kept:
            self._cached = await self._shards.filter_batch(batch.id, kept, self._helm.seq)
        else:
            await self._shards.clear_cache(batch.id, self._helm.seq)
            self._cached = None
        self._metrics.filter_duration.labels("decode").observe(self._clock() - began)

    async def clear(self) -> None:
        """Makes all shards forget everything, also after a failed call that they may have taken differently."""
        self._cached = None
        self._helm.abandon_step()
        await self._helm.flush()
        await self._shards.clear_cache(None, self._helm.seq)

    async def rest(self) -> None:
        """Tells the shards to forget what the last requests left; without another step they would never see it."""
        assert self._cached is None, "only an empty batch rests"
        if await self._helm.flush() is not None:
            await self._shards.clear_cache(None, self._helm.seq)

    def _launch(
        self, admitted: Sequence[GenerationRequest]
    ) -> tuple[str, Callable[[int, int], Coroutine[Any, Any, StepResult]]]:
        cached = self._cached
        if admitted:
            if cached is not None:
                self._metrics.batch_concat.inc("chunking")
            return "prefill", functools.partial(self._shards.prefill, admitted, next(self._ids), cached)
        assert cached is not None, "with no batch the head of the queue is always admitted"
        return "decode", functools.partial(self._shards.decode, [cached])

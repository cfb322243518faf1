"""The live batch as the shards hold it: every RPC that changes it, each behind the steering barrier it needs.

It knows the ids in the batch and nothing of the requests behind them.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Callable, Collection, Sequence

from chunkwise.core import CachedBatch, GenerationFailed, GenerationRequest, StepResult
from chunkwise.router.helm import Helm, StepCall
from chunkwise.router.metrics import Metrics
from chunkwise.router.shard_group import Shards

# How long before the expected end of a step the next one is sent. A message takes longest (up to 10 ms) just when the
# model keeps all cores busy. A request that arrives later than that waits for one more step.
_AHEAD_S = 0.015


class ShardBatch:
    """At most one batch is live, and at most one step waits for another."""

    def __init__(
        self, shards: Shards, helm: Helm, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shards = shards
        self._helm = helm
        self._metrics = metrics
        self._clock = clock
        self._ids = itertools.count(1)
        self._cached: CachedBatch | None = None
        self._ahead: asyncio.Task[StepResult] | None = None
        self._decode_s = 0.0

    @property
    def request_ids(self) -> tuple[int, ...]:
        """Ids of the requests in the batch, in the shards' order."""
        return self._cached.request_ids if self._cached is not None else ()

    @property
    def free_pages(self) -> int | None:
        """See `CachedBatch`; None also without a batch."""
        return self._cached.free_pages if self._cached is not None else None

    @property
    def is_ahead(self) -> bool:
        """Whether the next step has been sent already."""
        return self._ahead is not None

    @property
    def current_tokens(self) -> int:
        """Tokens that the next step computes for the requests already in the batch."""
        return self._cached.current_tokens if self._cached is not None else 0

    async def step(
        self,
        admitted: Sequence[GenerationRequest],
        meanwhile: Callable[[], None],
        goes_on: Callable[[], bool],
    ) -> StepResult:
        """Runs one step over the batch and those that join it.

        Args:
            meanwhile: called once the step is on its way, so that the shards do not wait for what it does.
            goes_on: asked shortly before the step is expected to end: whether the one after it will be a plain decode
                of what is then left of the batch. If so, that one is sent at once, and the shards need not wait for the
                router between the two. While `is_ahead`, nothing may be admitted or dropped.

        Raises:
            GenerationFailed: the step failed; call `clear` before the next one.
            ShardLost: the shards must be started anew.
        """
        began = self._clock()
        method, call = self._call(admitted)
        self._metrics.batch_count.inc(method)
        rpc, self._ahead = self._ahead or await self._helm.launch(call), None
        try:
            meanwhile()
            await self._helm.observe()
            if method == "decode":
                await self._run_ahead(rpc, began, goes_on)
            result = await rpc
        except BaseException as error:
            await self._drop(rpc)
            if isinstance(error, GenerationFailed):
                self._metrics.batch_failure.inc(method)
            raise
        self._metrics.step_done(method, self._clock() - began, result)
        if method == "decode":
            self._decode_s = result.total_ns / 1e9
        self._cached = result.batch
        return result

    async def _run_ahead(self, rpc: asyncio.Task[StepResult], began: float, goes_on: Callable[[], bool]) -> None:
        pause = began + self._decode_s - _AHEAD_S - self._clock()
        if pause > 0:
            await asyncio.wait({rpc}, timeout=pause)
        if self._cached is not None and not rpc.done() and goes_on():
            call = functools.partial(self._shards.decode, [self._cached], may_have_ended=True)
            self._ahead = await self._helm.launch(call, ahead=True)

    async def _drop(self, rpc: asyncio.Task[StepResult]) -> None:
        """Waits for nothing that was sent any more."""
        calls = [rpc] if self._ahead is None else [rpc, self._ahead]
        self._ahead = None
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

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

    def _call(self, admitted: Sequence[GenerationRequest]) -> tuple[str, StepCall]:
        cached = self._cached
        if admitted:
            if cached is not None:
                self._metrics.batch_concat.inc("chunking")
            return "prefill", functools.partial(self._shards.prefill, admitted, next(self._ids), cached)
        assert cached is not None or self.is_ahead, "with no batch the head of the queue is always admitted"
        return "decode", functools.partial(self._shards.decode, [cached] if cached is not None else [])

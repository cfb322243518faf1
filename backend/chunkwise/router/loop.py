"""Continuous batching: one task that runs step after step and hands every token to its request.

It decides only what runs next. Budgets are `backlog`'s, ranks are `helm`'s, RPCs are `batch`'s; HTTP is unknown here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from chunkwise.core import (
    ChunkwiseError,
    Generation,
    GenerationFailed,
    GenerationRequest,
    InvalidRequest,
    StepResult,
)
from chunkwise.router.answer import Answer, Ending, Event
from chunkwise.router.backlog import Backlog, Capacity, prompt_length
from chunkwise.router.batch import ShardBatch
from chunkwise.router.helm import Helm
from chunkwise.router.metrics import Metrics
from chunkwise.router.shard_group import ShardLost, Shards

_log = logging.getLogger(__name__)


class ServingStopped(GenerationFailed):
    """The loop has ended: nothing will be generated any more."""


@dataclass(slots=True)
class _Live:
    """A request in the batch, and the tokens it has got so far."""

    request: GenerationRequest
    ids: list[int]

    @property
    def generated(self) -> int:
        """Number of tokens it has got so far."""
        return len(self.ids)

    @property
    def computed(self) -> int:
        """Positions that have run through the model, at most; the last generated token never does."""
        return prompt_length(self.request) + max(self.generated - 1, 0)


class Loop:
    """The one caller of the shards' steps. Call `submit` from the event loop that runs `run`."""

    def __init__(
        self,
        shards: Shards,
        helm: Helm,
        capacity: Capacity,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._helm = helm
        self._batch = ShardBatch(shards, helm, metrics, clock=clock)
        self._capacity = capacity
        self._backlog = Backlog(capacity)
        self._metrics = metrics
        self._ids = itertools.count(1)
        self._answers: dict[int, Answer] = {}
        self._live: dict[int, _Live] = {}
        self._preempted: set[int] = set()
        self._cancelled: set[int] = set()
        self._outbox: list[tuple[Answer, Event]] = []
        self._wake = asyncio.Event()
        self._stopped: str | None = None
        # Read at a scrape: setting them at every step costs time that a token waits for.
        metrics.queue_size.set_function(lambda: len(self._backlog))
        metrics.batch_size.set_function(lambda: len(self._live))
        metrics.batch_tokens.set_function(self._reserved)

    @property
    def stopped(self) -> str | None:
        """Why nothing new is accepted; None while the loop serves."""
        return self._stopped

    def close(self) -> None:
        """Refuses new requests from now on; those in flight go on."""
        self._stopped = self._stopped or "the server is shutting down; send the request to another one"

    @property
    def in_flight(self) -> int:
        """Number of requests that wait or run."""
        return len(self._answers)

    def submit(self, request: GenerationRequest) -> Answer:
        """Queues a request under a fresh id; the id it came with is ignored.

        Raises:
            InvalidRequest: the request can never fit the KV cache.
            ServingStopped: the loop has ended, or is closing.
        """
        if self._stopped is not None:
            raise ServingStopped(self._stopped)
        request = replace(request, id=next(self._ids))
        self._backlog.push(request)
        answer = Answer(request.id, self.clock(), self._give_up)
        self._answers[request.id] = answer
        self._wake.set()
        return answer

    async def run(self) -> None:
        """Serves until cancelled. Ends every request that is then in flight.

        Raises:
            ShardLost: the shards must be started anew.
        """
        try:
            while True:
                await self._turn()
        except asyncio.CancelledError:
            self._stop("the server is shutting down")
            raise
        except Exception as error:
            self._stop(f"serving has ended after an error: {error}")
            raise

    def _stop(self, reason: str) -> None:
        self._stopped = reason
        self._hand_out()
        for answer in self._answers.values():
            answer.fail(ServingStopped(reason))
        self._answers.clear()

    def _give_up(self, request_id: int) -> None:
        self._answers.pop(request_id, None)
        waiting = self._backlog.remove(request_id)
        if waiting is None:
            self._cancelled.add(request_id)
        elif request_id in self._preempted:
            self._preempted.remove(request_id)
            self._helm.release(waiting, 0)

    async def _turn(self) -> None:
        """One step, or a wait for work. A failed call ends all requests in the batch and no others."""
        try:
            admitted: tuple[GenerationRequest, ...] = ()
            if not self._batch.is_ahead:
                await self._make_room()
                admitted = self._admit()
            if self._live or self._batch.is_ahead:
                self._take(await self._batch.step(admitted, self._hand_out, self._goes_on))
            else:
                self._hand_out()
                await self._rest()
        except ShardLost:
            raise
        except GenerationFailed as error:
            _log.error("a batch of %d requests failed: %s", len(self._live), error)
            self._hand_out()
            for request_id in list(self._live):
                self._fail(request_id, error)
            try:
                await self._batch.clear()
            except GenerationFailed as second:
                raise ShardLost(f"the shards could not be cleared after a failed step: {second}") from second

    def _goes_on(self) -> bool:
        """Whether, as far as can be known while a step runs, the next one is a decode of the same batch: nobody waits,
        nobody has given up, memory is not short, and somebody has tokens to come after this step's."""
        if self._backlog or self._cancelled or self._is_short():
            return False
        return any(live.generated + 1 < live.request.stopping.max_new_tokens for live in self._live.values())

    async def _rest(self) -> None:
        await self._batch.rest()
        self._wake.clear()
        if not self._backlog:
            await self._wake.wait()

    def _drop_cancelled(self) -> None:
        for request_id in self._cancelled & self._live.keys():
            live = self._live.pop(request_id)
            self._helm.release(live.request, live.computed)
        self._cancelled.clear()

    async def _make_room(self) -> None:
        """Drops who has given up. When memory is short, has a request compressed, and as long as even the next step
        lacks pages, pre-empts the youngest: the oldest always goes on, and alone it fits."""
        while True:
            self._drop_cancelled()
            await self._batch.keep(self._live.keys())
            if not self._lacks_pages() or len(self._live) < 2:
                break
            if not self._cancelled:
                self._preempt(max(self._live))
        if self._is_short():
            self._helm.compress()

    def _lacks_pages(self) -> bool:
        return self._batch.free_pages is not None and self._batch.free_pages < 0

    def _spare_pages(self) -> int | None:
        """Pages that are free beyond what the live requests need and may grow by; None if the shards do not tell."""
        if self._batch.free_pages is None:
            return None
        growth = sum(self._capacity.growth(live.request, live.generated) for live in self._live.values())
        return self._batch.free_pages - growth

    def _is_short(self) -> bool:
        """Whether the live requests have no room to grow, or the next one that waits has no room to come in."""
        free = self._batch.free_pages
        if free is None or (not self._backlog and free >= len(self._live) * self._capacity.most_growth):
            return False
        spare = self._spare_pages()
        return spare is not None and (spare < 0 or self._backlog.lacks(spare))

    def _preempt(self, request_id: int) -> None:
        live = self._live.pop(request_id)
        self._helm.pause(request_id)
        self._preempted.add(request_id)
        # Prompt logprobs came with the first token.
        logprobs = live.request.prefill_logprobs and not live.ids
        request = replace(live.request, resumed_ids=tuple(live.ids), chunk_len=None, prefill_logprobs=logprobs)
        self._backlog.put_back(request)
        self._metrics.preemptions.inc()

    def _admit(self) -> tuple[GenerationRequest, ...]:
        live = [live.request for live in self._live.values()]
        admitted = self._backlog.next_batch(live, self._batch.current_tokens, self._spare_pages())
        now = self.clock()
        for request in admitted:
            if request.id in self._preempted:
                self._preempted.remove(request.id)
                self._helm.resume(request.id)
            else:
                self._helm.admit(request)
                self._answers[request.id].started_at = now
            self._live[request.id] = _Live(request, list(request.resumed_ids))
        if admitted:
            self._metrics.next_size.observe(len(admitted))
        return admitted

    def _reserved(self) -> int:
        return sum(self._capacity.reserved(live.request) for live in self._live.values())

    def _take(self, result: StepResult) -> None:
        for generation in result.generations:
            live = self._live.get(generation.request_id)
            if live is not None:
                self._deliver(live, generation)
        for request_id in self._live.keys() - set(self._batch.request_ids):
            self._fail(request_id, GenerationFailed("the shards dropped the request before it was complete"))

    def _deliver(self, live: _Live, generation: Generation) -> None:
        request = live.request
        if generation.error is not None:
            kind = InvalidRequest if generation.error.kind == "validation" else GenerationFailed
            self._fail(request.id, kind(generation.error.message))
            return
        live.ids.append(generation.token.id)
        ending = None
        if generation.text is not None:
            del self._live[request.id]
            ending = Ending(generation.text, self._helm.release(request, live.computed))
            self._metrics.answer_done(request.adapter_id, live.generated, ending.report)
        else:
            self._helm.extend(request.id, generation.token.id)
        answer = self._answers.get(request.id)
        if answer is not None:
            event = Event(generation.token, generation.top_tokens, ending, generation.prefill_tokens)
            self._outbox.append((answer, event))
        if ending is not None:
            self._answers.pop(request.id, None)

    def _hand_out(self) -> None:
        """Gives the newest tokens to those who wait for them. Writing them to many clients takes longer than anything
        else here, so it waits until the next step has been launched."""
        for answer, event in self._outbox:
            answer.push(event)
        self._outbox.clear()

    def _fail(self, request_id: int, error: ChunkwiseError) -> None:
        live = self._live.pop(request_id)
        self._helm.release(live.request, live.computed)
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            answer.fail(error)

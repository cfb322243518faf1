"""The live batches of a foreign router: its ids become ours, and each of its calls goes to the shards behind the
steering barrier it needs.

Speaks `core` values; knows no protobuf and no sockets. One call at a time: its caller keeps the order. After an error
other than InvalidRequest and GenerationFailed, and after ShardLost, the shards must be started anew.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from chunkwise.config.settings import Limits
from chunkwise.core import (
    CachedBatch,
    Generation,
    GenerationFailed,
    GenerationRequest,
    InvalidRequest,
    StepResult,
    WarmupLimits,
)
from chunkwise.router.backlog import prompt_length
from chunkwise.router.helm import Helm
from chunkwise.router.shard_group import ShardLost, Shards
from chunkwise.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Live:
    """A request under our id. ``theirs`` is the caller's id; ``generated`` counts the tokens so far."""

    request: GenerationRequest
    theirs: int
    steered: bool
    generated: int = 0

    @property
    def computed(self) -> int:
        """Positions that have run through the model, at most; the last generated token never does."""
        return prompt_length(self.request) + max(self.generated - 1, 0)


class Relay:
    """Several batches may be live. The caller's ids may be any numbers and may repeat; ours are used once.

    Args:
        base_names: adapter ids that mean the base model, as OpenAI clients send them; a resident adapter of that name
            comes first.
        adapter_names: the resident adapters.
    """

    def __init__(
        self,
        shards: Shards,
        helm: Helm,
        tokenizer: Tokenizer,
        *,
        base_names: Collection[str],
        adapter_names: Collection[str],
    ) -> None:
        self._shards = shards
        self._helm = helm
        self._tokenizer = tokenizer
        self._base_names = frozenset(base_names) - frozenset(adapter_names)
        self._max_prompt = 0
        self._batch_ids = itertools.count(1)
        self._request_ids = itertools.count(1)
        self._batches: dict[int, CachedBatch] = {}
        self._live: dict[int, _Live] = {}

    async def warmup(self, limits: Limits) -> WarmupLimits:
        """Agrees the limits; what was live is forgotten. The prompt of Warmup is our own, of the length asked for."""
        await self.clear(None)
        agreed = await self._shards.warmup(limits)
        self._max_prompt = agreed.max_input_tokens
        return agreed

    async def prefill(self, batch_id: int, requests: Sequence[GenerationRequest], cached_id: int | None) -> StepResult:
        """Admits requests, into the named cached batch if there is one, and runs one step.

        Raises:
            InvalidRequest: no such cached batch; nothing has changed.
            GenerationFailed: the step failed; every request in it is gone.
        """
        tokenised = await asyncio.to_thread(lambda: [self._tokenise(request) for request in requests])
        if cached_id is None:
            await self.clear(batch_id)
        cached = self._pop(cached_id) if cached_id is not None else None
        joining = [self._admit(request) for request in tokenised]
        ours = next(self._batch_ids)
        ids = [*(cached.request_ids if cached is not None else ()), *(request.id for request in joining)]
        return await self._step(
            batch_id if cached_id is None else cached_id,
            ids,
            [ours] if cached is None else [cached.id, ours],
            partial(self._shards.prefill, joining, ours, cached),
        )

    async def decode(self, batch_ids: Sequence[int]) -> StepResult:
        """Merges the named batches into the first and runs one step. Raises as `prefill`."""
        names = list(dict.fromkeys(batch_ids))
        if not names:
            raise InvalidRequest("Decode names no batch; name at least one")
        self._check_known(names)
        batches = [self._pop(name) for name in names]
        ids = [id for batch in batches for id in batch.request_ids]
        return await self._step(names[0], ids, [b.id for b in batches], partial(self._shards.decode, batches))

    async def filter(self, batch_id: int, keep: Collection[int]) -> CachedBatch:
        """Keeps the named requests of a batch, in its order; unknown ones are ignored. Raises as `prefill`."""
        batch = self._pop(batch_id)
        wanted = frozenset(keep)
        kept = tuple(id for id in batch.request_ids if self._live[id].theirs in wanted)
        self._release(id for id in batch.request_ids if id not in kept)
        await self._helm.flush()
        seq = self._helm.seq
        if not kept:
            await self._shards.clear_cache(batch.id, seq)
            return CachedBatch(batch_id, (), 0, 0)
        try:
            rest = await self._shards.filter_batch(batch.id, kept, seq)
        except ShardLost:
            raise
        except GenerationFailed:
            await self._abandon(kept, [batch.id])
            raise
        self._batches[batch_id] = rest
        return self._described(batch_id, rest)

    async def clear(self, batch_id: int | None) -> None:
        """Forgets one batch, or all (None), also those that only the shards know. An unknown batch is no error."""
        gone = list(self._batches) if batch_id is None else [batch_id] if batch_id in self._batches else []
        batches = [self._batches.pop(name) for name in gone]
        self._release(id for batch in batches for id in batch.request_ids)
        if batch_id is None or batches:
            await self._helm.flush()
            await self._shards.clear_cache(None if batch_id is None else batches[0].id, self._helm.seq)

    def _tokenise(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its prompt's ids, as the shard would compute them."""
        if request.prompt_ids is not None:
            return request
        ids = self._tokenizer.encode(
            request.inputs, add_special_tokens=request.add_special_tokens, truncate=request.truncate
        )
        return replace(request, prompt_ids=tuple(ids))

    def _admit(self, request: GenerationRequest) -> GenerationRequest:
        """The request under an id of ours. A prompt that the shards will refuse is not worth planning."""
        adapter_id = request.adapter_id if request.adapter_id not in self._base_names else None
        own = replace(request, id=next(self._request_ids), adapter_id=adapter_id)
        steered = 0 < prompt_length(own) <= self._max_prompt
        if steered:
            self._helm.admit(own)
        self._live[own.id] = _Live(own, request.id, steered)
        return own

    async def _step(
        self,
        name: int,
        ids: Sequence[int],
        batch_ids: Sequence[int],
        launch: Callable[[int, int], Coroutine[Any, Any, StepResult]],
    ) -> StepResult:
        """Runs a step over the requests ``ids``; what goes on is kept under the caller's ``name``."""
        try:
            result = await self._helm.step(launch)
        except ShardLost:
            raise
        except GenerationFailed as error:
            _log.error("a batch of %d requests failed: %s", len(ids), error)
            self._helm.abandon_step()
            await self._abandon(ids, batch_ids)
            raise
        going_on = frozenset(result.batch.request_ids if result.batch is not None else ())
        generations = [
            self._taken(generation) for generation in result.generations if generation.request_id in self._live
        ]
        cached = None
        if result.batch is not None:
            self._batches[name] = result.batch
            cached = self._described(name, result.batch)
        self._release(id for id in ids if id not in going_on)
        self._relieve(result.batch)
        return replace(result, generations=tuple(generations), batch=cached)

    def _relieve(self, batch: CachedBatch | None) -> None:
        """Has a request compressed when the shards lack a page for each. Whom to admit is for the caller to decide."""
        if batch is not None and batch.free_pages is not None and batch.free_pages < len(self._live):
            self._helm.compress()

    def _taken(self, generation: Generation) -> Generation:
        live = self._live[generation.request_id]
        live.generated += 1
        if live.steered:
            self._helm.extend(generation.request_id, generation.token.id)
        return replace(generation, request_id=live.theirs)

    async def _abandon(self, ids: Sequence[int], batch_ids: Sequence[int]) -> None:
        """Forgets requests and batches here and on every shard: the shards may have taken a failed call differently."""
        self._release(ids)
        await self._helm.flush()
        for batch_id in batch_ids:
            await self._shards.clear_cache(batch_id, self._helm.seq)

    def _release(self, ids: Iterable[int]) -> None:
        for id in ids:
            live = self._live.pop(id)
            if live.steered:
                report = self._helm.release(live.request, live.computed)
                _log.debug(
                    "a request has left: adapter %s, %d positions, mean rank %.2f",
                    live.request.adapter_id,
                    live.computed,
                    report.mean_rank,
                )

    def _described(self, name: int, batch: CachedBatch) -> CachedBatch:
        """A batch as the caller knows it."""
        return replace(batch, id=name, request_ids=tuple(self._live[id].theirs for id in batch.request_ids))

    def _pop(self, name: int) -> CachedBatch:
        self._check_known([name])
        return self._batches.pop(name)

    def _check_known(self, names: Sequence[int]) -> None:
        unknown = [name for name in names if name not in self._batches]
        if unknown:
            raise InvalidRequest(f"batches {unknown} are not cached; cached are {sorted(self._batches)}")

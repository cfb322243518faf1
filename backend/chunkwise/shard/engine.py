"""The live batches of a shard and what each generate.v3 call does to them. Speaks `core` values; knows no protobuf.

Not thread-safe: the server calls it from one thread. Every tensor-parallel rank gets the same calls in the same order
and makes the same decisions, because they depend on token counts and gathered logits only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from torch import Tensor

from chunkwise.core import (
    AdapterInfo,
    CachedBatch,
    ChunkwiseError,
    Generation,
    GenerationFailed,
    GenerationRequest,
    InvalidRequest,
    KvFormat,
    SamplingParams,
    ShardInfo,
    ShardState,
    StepResult,
    StepSignals,
    StoppingParams,
    WarmupLimits,
)
from chunkwise.kv.cache import KvCache
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import Group
from chunkwise.shard.admission import Admission
from chunkwise.shard.capacity import agree_limits, capacity_pages
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.shard.memory import resident_bytes
from chunkwise.shard.runner import StepOutcome, StepRunner, failure
from chunkwise.shard.scheduler import next_step_tokens
from chunkwise.shard.sequence import Sequence
from chunkwise.shard.watermark import Watermark
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.errors import AdapterError
from chunkwise_adapters.store import AdapterStore

PAGE_SIZE = 16
# Warmup computes this many tokens on CPU, where nothing is captured or tuned and a long prompt would only cost time.
_CPU_WARMUP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """``max_batch_total_tokens`` sizes the KV cache (None: from free memory); ``prefix_caching`` reuses keys and values
    of earlier prompts; ``prefill_logprobs`` answers requests for prompt logprobs, which are ignored otherwise, as in
    TGI; ``model_sha`` is reported in Info."""

    max_batch_total_tokens: int | None = None
    prefix_caching: bool = True
    prefill_logprobs: bool = False
    model_sha: str = ""
    watermark: Watermark = field(default_factory=Watermark)


class Engine:
    """One rank's engine."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        adapters: AdapterStore,
        decisions: DecisionTable,
        grammars: GrammarCompiler,
        settings: EngineSettings,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._decisions = decisions
        self._settings = settings
        agree = self._agree if adapters.evicts else bool
        self._admission = Admission(tokenizer, adapters, model.spec.vocab, grammars, settings.watermark, agree)
        self._eos_id = min(tokenizer.eos_ids, default=0)
        self._batches: dict[int, list[Sequence]] = {}
        self._live = 0
        self._dropped = 0
        self._runner: StepRunner | None = None
        self._limits: WarmupLimits | None = None
        self._observe: Callable[[SequenceOf[Sequence]], None] | None = None

    @property
    def group(self) -> Group:
        """The ranks that compute together."""
        return self._model.group

    def info(self) -> ShardInfo:
        """What a router must know before Warmup; the type is that of the weights, unless they are in 8 or 4 bits."""
        stored = self._model.storage
        return ShardInfo(
            dtype=str(stored if stored.is_floating_point else self._model.dtype).removeprefix("torch."),
            device_type=self._model.device.type,
            page_size=PAGE_SIZE,
            max_position_embeddings=self._model.spec.max_position,
            model_sha=self._settings.model_sha,
            adapters=tuple(
                AdapterInfo(a.name, a.content_hash, a.trained_rank, a.rungs, a.kept_energy, a.mean_active_rank)
                for a in self._adapters.infos()
            ),
        )

    def state(self) -> ShardState:
        """What is held now; callable from any thread."""
        cache = self._runner.cache if self._runner else None
        return ShardState(
            sequences=self._live,
            steered_requests=len(self._decisions),
            kv=cache.usage() if cache else (),
            kv_bytes_budget=cache.allocator.budget_bytes if cache else 0,
            resident_bytes=resident_bytes(),
            reused_tokens=cache.prefix.reused_pages * PAGE_SIZE if cache else 0,
            kv_rewritten_pages=cache.rewritten_pages if cache else 0,
            kv_dropped_tokens=cache.dropped_tokens if cache else 0,
            kv_full_bytes=cache.full_bytes(self._dropped) if cache else 0,
            kv_free_pages=cache.allocator.free(KvFormat.FULL) if cache else 0,
            kv_evicted_pages=cache.prefix.evicted_pages if cache else 0,
        )

    def warmup(
        self,
        requests: SequenceOf[GenerationRequest],
        max_prefill_tokens: int,
        max_input_tokens: int | None,
        max_total_tokens: int | None,
    ) -> WarmupLimits:
        """Fixes the limits, sizes the KV cache and runs one step over the first request.

        Raises:
            InvalidRequest: limits that contradict each other, the model or the memory.
        """
        self.clear_cache(None)
        # The old cache goes first, or the memory it takes would not be counted as free.
        self._runner = None
        shape = self._model.kv_shape(PAGE_SIZE)
        page_bytes = shape.page_bytes(self._model.dtype)[KvFormat.FULL]
        here = capacity_pages(self._settings.max_batch_total_tokens, page_bytes, PAGE_SIZE, self._model)
        pages = self._model.group.minimum(here)
        cache = KvCache(shape, self._model.dtype, self._model.device, pages * page_bytes)
        # Where pools divide the budget, full pages are fewer than it would fit.
        full = cache.allocator.room(KvFormat.FULL)
        limits = agree_limits(full, PAGE_SIZE, self._model.spec.max_position, max_input_tokens, max_total_tokens)
        self._runner = StepRunner(self._model, cache, self._tokenizer, self._decisions, max(max_prefill_tokens, 1))
        self._limits = limits
        self._rehearse(requests[:1])
        return limits

    def prefill(
        self, batch_id: int, requests: SequenceOf[GenerationRequest], cached: int | None, seq: int, step: int
    ) -> tuple[StepResult, StepSignals]:
        """Admits requests, joins them to the cached batch if one is named, and runs one step over all.

        A request that is refused ends with an error of its own. The result takes the cached batch's id, if any.

        Raises:
            InvalidRequest: no such cached batch, or no Warmup yet.
            GenerationFailed: the step as a whole failed; every request in it is lost and its memory is free again.
        """
        limits = self._require_limits()
        if cached is None and batch_id in self._batches:
            raise InvalidRequest(f"batch {batch_id} is cached already; give new batches new ids, or clear it first")
        sequences = [] if cached is None else self._pop(cached)
        refused: list[Generation] = []
        try:
            self._decisions.apply(seq)
            for request in requests:
                self._admit(request, limits, sequences, refused)
        except Exception as error:
            self._release(sequences)
            raise GenerationFailed(f"the batch could not be admitted: {error}") from error
        return self._step(batch_id if cached is None else cached, sequences, step, refused)

    def decode(
        self, batch_ids: SequenceOf[int], seq: int, step: int, may_have_ended: bool = False
    ) -> tuple[StepResult, StepSignals]:
        """Merges the named batches into the first and runs one step; with ``may_have_ended``, those that are cached.
        Raises as `prefill`."""
        self._require_limits()
        if may_have_ended:
            batch_ids = [id for id in batch_ids if id in self._batches]
            if not batch_ids:
                self._decisions.apply(seq)
                return StepResult((), None), StepSignals(step)
        if not batch_ids:
            raise InvalidRequest("Decode names no batch; name at least one")
        unknown = [id for id in batch_ids if id not in self._batches]
        if unknown:
            raise InvalidRequest(f"batches {unknown} are not cached; cached are {sorted(self._batches)}")
        sequences = [sequence for id in dict.fromkeys(batch_ids) for sequence in self._pop(id)]
        try:
            self._decisions.apply(seq)
        except GenerationFailed:
            self._release(sequences)
            raise
        return self._step(batch_ids[0], sequences, step, [])

    def filter_batch(self, batch_id: int, keep: SequenceOf[int], seq: int) -> CachedBatch:
        """Keeps the named requests of a batch, in the batch's order, and releases all others.

        Raises:
            InvalidRequest: no such batch.
        """
        sequences = self._pop(batch_id)
        kept = [s for s in sequences if s.request.id in set(keep)]
        self._release([s for s in sequences if s not in kept])
        if kept:
            self._batches[batch_id] = kept
        self._tally()
        self._decisions.apply(seq)
        return self._describe(batch_id, kept)

    def clear_cache(self, batch_id: int | None, seq: int = 0) -> None:
        """Releases one batch, or all. An unknown batch is no error."""
        for id in list(self._batches) if batch_id is None else [batch_id]:
            self._release(self._batches.pop(id, []))
        self._tally()
        self._decisions.apply(seq)

    def watch(self, observe: Callable[[SequenceOf[Sequence]], None]) -> None:
        """Calls ``observe`` after every step with all sequences of the batch, before those that ended give their pages
        back: what a step did, gates and pages included, can be read off them. It must not change them."""
        self._observe = observe

    def watch_scored(self, observe: Callable[[Tensor], None] | None) -> None:
        """Calls ``observe`` as `Llama.watch_scored` says: the distributions behind the logprobs of prompts."""
        self._model.watch_scored(observe)

    def check_integrity(self) -> None:
        """Checks that live sequences hold exactly the pages in use. Raises AssertionError otherwise."""
        if self._runner:
            tables = [sequence.pages for batch in self._batches.values() for sequence in batch]
            tables.append(self._runner.cache.prefix.pages())
            self._runner.cache.allocator.check_integrity(tables)

    def _step(
        self, batch_id: int, sequences: list[Sequence], step: int, refused: list[Generation]
    ) -> tuple[StepResult, StepSignals]:
        start = time.perf_counter_ns()
        try:
            outcome = self._require_runner().step(sequences) if sequences else StepOutcome()
        except Exception as error:
            self._release(sequences)
            raise GenerationFailed(f"the step failed: {error}") from error
        if self._observe is not None:
            self._observe(sequences)
        self._release(outcome.ended)
        live = [s for s in sequences if s not in outcome.ended]
        if live:
            self._batches[batch_id] = live
        self._tally()
        emits = self._model.group.rank == 0
        result = StepResult(
            generations=tuple(refused + outcome.generations) if emits else (),
            batch=self._describe(batch_id, live) if live else None,
            forward_ns=outcome.forward_ns,
            decode_ns=outcome.decode_ns,
            total_ns=time.perf_counter_ns() - start,
        )
        return result, StepSignals(step, tuple(outcome.signals))

    def _admit(
        self,
        request: GenerationRequest,
        limits: WarmupLimits,
        sequences: list[Sequence],
        refused: list[Generation],
    ) -> None:
        """Appends the request's sequence to ``sequences``, or the Generation that refuses it to ``refused``."""
        if request.prefill_logprobs and not self._settings.prefill_logprobs:
            request = replace(request, prefill_logprobs=False)
        try:
            sequence = self._admission.admit(request, limits)
            if self._settings.prefix_caching:
                self._require_runner().reuse_prefix(sequence)
        except (ChunkwiseError, AdapterError) as error:
            self._decisions.forget(request.id)
            refused.append(failure(request.id, error, self._eos_id))
        else:
            sequences.append(sequence)
            self._live += 1

    def _rehearse(self, requests: SequenceOf[GenerationRequest]) -> None:
        """Runs a step over Warmup's first request, so that the first real one does not pay for lazy set-up. Warmup's
        requests carry parameters (image chunk, wrapped max_new_tokens) that only their length is taken from."""
        runner, limits = self._require_runner(), self._require_limits()
        for request in requests:
            ids = self._tokenizer.encode(request.inputs, truncate=request.truncate) or [0]
            most = _CPU_WARMUP_TOKENS if self._model.device.type == "cpu" else limits.max_input_tokens
            neutral = GenerationRequest(
                id=request.id,
                inputs="",
                sampling=SamplingParams(),
                stopping=StoppingParams(max_new_tokens=1),
                prompt_ids=tuple(ids[: min(most, limits.max_input_tokens)]),
            )
            sequence = self._admission.admit(neutral, limits)
            self._live += 1
            try:
                errors = [g.error for g in runner.step([sequence]).generations if g.error is not None]
            finally:
                self._release([sequence])
            if errors:
                raise GenerationFailed(f"warm-up failed: {errors[0].message}")

    def _agree(self, fine: bool) -> bool:
        return self._model.group.minimum(int(fine)) == 1

    def _describe(self, batch_id: int, sequences: SequenceOf[Sequence]) -> CachedBatch:
        return CachedBatch(
            batch_id,
            tuple(s.request.id for s in sequences),
            max_tokens=sum(s.prompt_tokens + s.request.stopping.max_new_tokens for s in sequences),
            current_tokens=next_step_tokens(sequences, self._runner.budget) if self._runner else 0,
            free_pages=self._free_pages(),
        )

    def _tally(self) -> None:
        """Counts what `state` tells of the live sequences: they are not safe to look at while a step runs."""
        self._dropped = sum(s.kv.dropped for sequences in self._batches.values() for s in sequences)

    def _free_pages(self) -> int:
        """See `CachedBatch`. Tokens that are dropped later count in full: they are computed first."""
        room = self._require_runner().cache.allocator.room(KvFormat.FULL)
        return room - sum(
            -(-len(sequence.ids) // PAGE_SIZE) + -sequence.computed // PAGE_SIZE
            for sequences in self._batches.values()
            for sequence in sequences
        )

    def _pop(self, batch_id: int) -> list[Sequence]:
        if batch_id not in self._batches:
            raise InvalidRequest(f"batch {batch_id} is not cached; cached are {sorted(self._batches)}")
        return self._batches.pop(batch_id)

    def _release(self, sequences: SequenceOf[Sequence]) -> None:
        for sequence in sequences:
            self._require_runner().release(sequence)
            self._live -= 1

    def _require_runner(self) -> StepRunner:
        if self._runner is None:
            raise InvalidRequest("the shard has not been warmed up; call Warmup first")
        return self._runner

    def _require_limits(self) -> WarmupLimits:
        if self._limits is None:
            raise InvalidRequest("the shard has not been warmed up; call Warmup first")
        return self._limits

"""Shards without a model: the real `Shards` protocol in this process, with a toy generation that depends on a request's
prompt, adapter and seed alone. Breaks of the protocol are errors here, as they are on a real shard."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from chunkwise.config.settings import Limits
from chunkwise.core import (
    AdapterInfo,
    CachedBatch,
    ChunkDecision,
    FinishReason,
    GeneratedText,
    Generation,
    GenerationFailed,
    GenerationRequest,
    KvDecision,
    KvFormat,
    KvUsage,
    RequestError,
    SequenceSignals,
    ShardInfo,
    ShardState,
    SteeringUpdate,
    SteeringViolation,
    StepResult,
    StepSignals,
    Token,
    WarmupLimits,
)

ADAPTERS = tuple(
    AdapterInfo(name, f"hash of {name}", 8, (2, 4, 8), (0.5, 0.75, 1.0), (2.0, 4.0, 8.0)) for name in ("law", "med")
)
INFO = ShardInfo("float32", "cpu", 4, 256, "abc123", ADAPTERS)
LIMITS = WarmupLimits(max_input_tokens=100, max_total_tokens=128, max_supported_total_tokens=512)
EOS = Token(1, -0.125, "</s>", True)


@dataclass(frozen=True, slots=True)
class Call:
    """One call, in order. ``ids`` are request ids (of clear_cache: the batch id); None: there is no such number."""

    name: str
    ids: tuple[int, ...] = ()
    seq: int | None = None
    step: int | None = None


@dataclass(slots=True)
class FakeSequence:
    """A live request: ``computed`` positions are in the cache, ``letters`` were generated."""

    request: GenerationRequest
    computed: int = 0
    letters: str = ""
    kv: list[KvDecision] = field(default_factory=list)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.prompt_ids or ()

    @property
    def known(self) -> int:
        """Positions to be computed before the next letter."""
        return len(self.prompt) + len(self.letters)

    @property
    def pending(self) -> int:
        """Positions that the next step has to compute if nothing limits it but the KV decisions to come."""
        cut = min((kv.effective for kv in self.kv if kv.effective > self.computed), default=self.known)
        return max(1, min(cut, self.known) - self.computed)

    def pages(self, size: int) -> float:
        """Full pages' worth of memory that it holds: a page that was rewritten counts half."""
        rewritten = sum(kv.end - kv.start for kv in self.kv if kv.effective < self.computed)
        return -(-self.computed // size) - rewritten / size / 2


def letter(request: GenerationRequest, index: int) -> str:
    """The toy model: the letter that a request gets at ``index``."""
    sampling = request.sampling
    mix = sum(request.prompt_ids or ()) + len(request.adapter_id or "") + (sampling.seed if sampling.samples else 0)
    return chr(ord("a") + (mix * 31 + index * index * 7 + index) % 26)


def toy_text(request: GenerationRequest, length: int) -> str:
    """The first ``length`` letters that a request gets."""
    return "".join(letter(request, index) for index in range(length))


@dataclass
class FakeShards:
    """``eos_at`` ends a prompt (by its text) at that token index; ``errors`` refuses a prompt at its first token.

    ``failures[name]`` are raised by the next calls of that name. Steps take ``step_seconds`` and wait while ``running``
    is cleared; signals come ``signal_seconds`` late. With ``kv_pages`` the KV cache is that large and tells what is
    free; a step that lacks pages breaks the protocol. ``filtered`` are the ids that each filter_batch dropped, by its
    place in ``calls``.
    """

    shard_info: ShardInfo = INFO
    limits: WarmupLimits = LIMITS
    step_tokens: int = 64
    kv_pages: int | None = None
    eos_at: dict[str, int] = field(default_factory=dict)
    errors: dict[str, RequestError] = field(default_factory=dict)
    failures: dict[str, list[Exception]] = field(default_factory=dict)
    step_seconds: float = 0.0
    signal_seconds: float = 0.0
    calls: list[Call] = field(default_factory=list)
    updates: list[SteeringUpdate] = field(default_factory=list)
    batches: dict[int, list[FakeSequence]] = field(default_factory=dict)
    steered: set[int] = field(default_factory=set)
    computed: dict[int, int] = field(default_factory=dict)
    chunk_starts: dict[int, int] = field(default_factory=dict)
    kv_ends: dict[int, int] = field(default_factory=dict)
    kv: dict[int, list[KvDecision]] = field(default_factory=dict)
    filtered: dict[int, set[int]] = field(default_factory=dict)
    applied_seq: int = 0
    closed: bool = False
    health_error: GenerationFailed | None = None

    def __post_init__(self) -> None:
        self.running = asyncio.Event()
        self.running.set()
        self._signals: asyncio.Queue[StepSignals] = asyncio.Queue()
        self._lane = asyncio.Lock()

    async def info(self) -> ShardInfo:
        self._enter(Call("info"))
        return self.shard_info

    async def warmup(self, limits: Limits) -> WarmupLimits:
        self._enter(Call("warmup"))
        return replace(
            self.limits,
            max_input_tokens=limits.max_input_tokens or self.limits.max_input_tokens,
            max_total_tokens=limits.max_total_tokens or self.limits.max_total_tokens,
        )

    async def prefill(
        self, requests: Sequence[GenerationRequest], batch_id: int, cached: CachedBatch | None, seq: int, step: int
    ) -> StepResult:
        async with self._lane:
            old = self.batches.pop(cached.id) if cached is not None else []
            self._enter(Call("prefill", tuple(request.id for request in requests), seq, step))
            self._apply(seq)
            new = [
                FakeSequence(
                    request, letters=bytes(request.resumed_ids).decode(), kv=self.kv.setdefault(request.id, [])
                )
                for request in requests
            ]
            return await self._run(cached.id if cached is not None else batch_id, old + new, step)

    async def decode(
        self, batches: Sequence[CachedBatch], seq: int, step: int, may_have_ended: bool = False
    ) -> StepResult:
        if may_have_ended:
            self._enter(Call("send_ahead", step=step))
        async with self._lane:
            known = [cached for cached in batches if cached.id in self.batches or not may_have_ended]
            sequences = [sequence for cached in known for sequence in self.batches.pop(cached.id)]
            self._enter(Call("decode", tuple(sequence.request.id for sequence in sequences), seq, step))
            self._apply(seq)
            return await self._run(batches[0].id, sequences, step)

    async def filter_batch(self, batch_id: int, request_ids: Sequence[int], seq: int) -> CachedBatch:
        self._enter(Call("filter_batch", tuple(request_ids), seq))
        self._apply(seq)
        held = {sequence.request.id for sequence in self.batches[batch_id]}
        if not set(request_ids) <= held:
            raise GenerationFailed(f"batch {batch_id} holds {held}, not {request_ids}")
        self.filtered[len(self.calls) - 1] = held - set(request_ids)
        self.batches[batch_id] = [s for s in self.batches[batch_id] if s.request.id in request_ids]
        return self._cached(batch_id)

    async def clear_cache(self, batch_id: int | None, seq: int) -> None:
        self._enter(Call("clear_cache", () if batch_id is None else (batch_id,), seq))
        self._apply(seq)
        for known in list(self.batches) if batch_id is None else [batch_id]:
            self.batches.pop(known, None)

    async def health(self) -> tuple[ShardState, ...]:
        if self.health_error is not None:
            raise self.health_error
        held = sum(sequence.computed for batch in self.batches.values() for sequence in batch)
        usage = (KvUsage(KvFormat.FULL, held, held * 100),)
        live = sum(len(batch) for batch in self.batches.values())
        return (ShardState(live, len(self.steered), usage, 10_000, 123_456),)

    async def steer(self, update: SteeringUpdate) -> None:
        if update.seq != len(self.updates) + 1:
            raise SteeringViolation(f"update {update.seq} follows update {len(self.updates)}")
        self._enter(Call("steer", update.released, update.seq))
        self.updates.append(update)

    async def signals(self, step: int) -> StepSignals:
        await asyncio.sleep(self.signal_seconds)
        while (signals := await self._signals.get()).step < step:
            pass
        assert signals.step == step, "steps are asked for in order"
        self._enter(Call("signals", step=step))
        return signals

    async def close(self) -> None:
        self.closed = True

    def check_empty(self) -> None:
        """After the last request nothing may be left."""
        assert not self.batches
        assert not self.steered, f"decisions of {self.steered} were never released"

    def named(self, *names: str) -> list[Call]:
        """The calls with one of these names."""
        return [call for call in self.calls if call.name in names]

    def _enter(self, call: Call) -> None:
        self.calls.append(call)
        if self.failures.get(call.name):
            raise self.failures[call.name].pop(0)

    def _apply(self, seq: int) -> None:
        assert self.applied_seq <= seq <= len(self.updates), "a barrier names an update that was sent, in order"
        for update in self.updates[self.applied_seq : seq]:
            for chunk in update.chunks:
                self._follow(chunk)
            for kv in update.kv:
                self._compress(kv)
            self.steered |= {chunk.request_id for chunk in update.chunks} | {kv.request_id for kv in update.kv}
            self.steered -= set(update.released)
            for request_id in update.released:
                for table in (self.computed, self.chunk_starts, self.kv_ends, self.kv):
                    table.pop(request_id, None)
        self.applied_seq = seq

    def _follow(self, chunk: ChunkDecision) -> None:
        """As `shard.sequence.Sequence.follow`."""
        latest = self.chunk_starts.get(chunk.request_id, -1)
        if chunk.start <= latest or chunk.start < self.computed.get(chunk.request_id, 0):
            raise SteeringViolation(f"{chunk} comes too late: {self.computed}, {latest}")
        if all(chunk.rung not in info.rungs for info in self.shard_info.adapters):
            raise SteeringViolation(f"{chunk} names no rung of any adapter")
        self.chunk_starts[chunk.request_id] = chunk.start

    def _compress(self, kv: KvDecision) -> None:
        """Ranges ascend and are computed when they are to be rewritten, which nothing computed has missed."""
        in_time = self.computed.get(kv.request_id, 0) <= kv.effective
        if not self.kv_ends.get(kv.request_id, 0) <= kv.start < kv.end <= kv.effective or not in_time:
            raise SteeringViolation(f"{kv} comes too late or behind {self.kv_ends}: {self.computed}")
        self.kv_ends[kv.request_id] = kv.end
        self.kv.setdefault(kv.request_id, []).append(kv)

    def _cached(self, batch_id: int) -> CachedBatch:
        sequences = self.batches[batch_id]
        ids = tuple(sequence.request.id for sequence in sequences)
        current = sum(min(self.step_tokens, sequence.pending) for sequence in sequences)
        return CachedBatch(batch_id, ids, 0, current, self._free_pages())

    def _free_pages(self) -> int | None:
        """What is left of the cache once every known token is computed."""
        if self.kv_pages is None:
            return None
        size = self.shard_info.page_size
        live = [sequence for batch in self.batches.values() for sequence in batch]
        owed = sum(-(-sequence.known // size) - -(-sequence.computed // size) for sequence in live)
        return math.floor(self.kv_pages - sum(sequence.pages(size) for sequence in live) - owed)

    async def _run(self, batch_id: int, sequences: list[FakeSequence], step: int) -> StepResult:
        await self.running.wait()
        if self.step_seconds:
            await asyncio.sleep(self.step_seconds)
        generations: list[Generation] = []
        signals: list[SequenceSignals] = []
        kept: list[FakeSequence] = []
        for sequence in sequences:
            first = sequence.computed == 0 and sequence.request.chunk_len is not None
            limit = (sequence.request.chunk_len or 0) if first else self.step_tokens
            sequence.computed += min(limit, sequence.pending)
            self.computed[sequence.request.id] = sequence.computed
            entropy = (sum(sequence.prompt) + sequence.computed * 13) % 10 / 10
            signals.append(SequenceSignals(sequence.request.id, sequence.computed - 1, entropy))
            generation = self._generate(sequence) if sequence.computed >= sequence.known else None
            if generation is not None:
                generations.append(generation)
            if generation is None or (generation.text is None and generation.error is None):
                kept.append(sequence)
        if step:
            self._signals.put_nowait(StepSignals(step, tuple(signals)))
        if self.kv_pages is not None:
            held = sum(sequence.pages(self.shard_info.page_size) for sequence in sequences)
            assert held <= self.kv_pages, f"{held} pages are held of {self.kv_pages}"
        if not kept:
            return StepResult(tuple(generations), None, 1_000_000, 1_000, 2_000_000)
        self.batches[batch_id] = kept
        return StepResult(tuple(generations), self._cached(batch_id), 1_000_000, 1_000, 2_000_000)

    def _generate(self, sequence: FakeSequence) -> Generation:
        request, index = sequence.request, len(sequence.letters)
        if request.inputs in self.errors:
            return Generation(request.id, EOS, error=self.errors[request.inputs])
        if self.eos_at.get(request.inputs) == index:
            return Generation(request.id, EOS, self._ending(sequence, FinishReason.EOS_TOKEN, index + 1))
        luck = request.sampling.seed % 1024 / 1024 if request.sampling.samples else 0.0
        token = Token(ord(letter(request, index)), -0.5 - luck - index / 8, letter(request, index), False)
        sequence.letters += token.text
        ending = None
        if len(sequence.letters) >= request.stopping.max_new_tokens:
            ending = self._ending(sequence, FinishReason.LENGTH, index + 1)
        elif any(sequence.letters.endswith(stop) for stop in request.stopping.stop_sequences):
            ending = self._ending(sequence, FinishReason.STOP_SEQUENCE, index + 1)
        others = tuple(Token(ord("A") + i, float("-inf"), chr(ord("A") + i), False) for i in range(4))
        top_tokens = (token, *others)[: request.top_n_tokens]
        return Generation(request.id, token, ending, top_tokens)

    def _ending(self, sequence: FakeSequence, reason: FinishReason, count: int) -> GeneratedText:
        sampling = sequence.request.sampling
        seed = sampling.seed if sampling.samples else None
        held = 100 * sequence.computed
        return GeneratedText(sequence.letters, count, reason, seed, kv_bytes=held, kv_full_bytes=4 * held)

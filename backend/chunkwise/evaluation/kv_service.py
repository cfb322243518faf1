"""What a KV policy costs and saves while long prompts are served: bytes held, resident memory, perplexity, speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chunkwise.config.policy import KvPolicy, SteeringPolicy
from chunkwise.core import (
    CachedBatch,
    GenerationFailed,
    GenerationRequest,
    SamplingParams,
    ShardState,
    StepResult,
    StoppingParams,
)
from chunkwise.evaluation.helm import LocalHelm
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.engine import Engine

ALWAYS = {
    "full": KvPolicy(kind="full"),
    "int8": KvPolicy(kind="int8", when="always"),
    "int4": KvPolicy(kind="int4", when="always"),
    "keep50-norm": KvPolicy(kind="keep", when="always"),
    "keep50-diversity": KvPolicy(kind="keep", when="always", scorer="key_diversity"),
    "window": KvPolicy(kind="window", when="always"),
    "complexity": KvPolicy(kind="complexity", when="always"),
}
"""Policies by name, each for every request and whatever memory there is."""


@dataclass(frozen=True, slots=True)
class Service:
    """What was measured. ``held`` are the pages by format, and ``held_bytes`` their bytes, that all requests together
    held before the first ended, ``held_peak`` the most bytes behind any step; ``resident`` bytes are those of the
    process beyond what it had before, at the same moment and at its peak. ``nll`` is the mean over the prompts' tokens,
    in nats."""

    held: dict[str, int]
    held_bytes: int
    held_peak: int
    resident: int
    resident_peak: int
    nll: float
    prompt_seconds: float
    decode_ms: float

    @property
    def perplexity(self) -> float:
        """Of the prompts' tokens."""
        return math.exp(self.nll)


def serve(
    engine: Engine, decisions: DecisionTable, kv: KvPolicy, prompts: Sequence[tuple[int, ...]], new_tokens: int
) -> Service:
    """Serves the prompts at once, ``new_tokens`` greedy tokens each, on an engine that is warmed up and gives prompt
    logprobs: more tokens than the prompts take steps, or the first answer ends before the last begins. Linux only.

    Raises:
        GenerationFailed: a prompt could not be served.
    """
    requests = [
        GenerationRequest(
            id, "", SamplingParams(), StoppingParams(new_tokens, ignore_eos=True), prompt_ids=ids, prefill_logprobs=True
        )
        for id, ids in enumerate(prompts, start=1)
    ]
    before, run = restart_peak(), _Run(len(prompts))
    helm = LocalHelm(decisions, SteeringPolicy(kv=kv), engine.info().page_size)
    for result, state, seconds in _steps(engine, helm, requests):
        run.take(result, state, seconds)
    return Service(
        held={usage.format.name.lower(): usage.pages for usage in run.together.kv},
        held_bytes=_held(run.together),
        held_peak=run.held_peak,
        resident=run.together.resident_bytes - before,
        resident_peak=peak_bytes() - before,
        nll=-sum(run.logprobs) / len(run.logprobs),
        prompt_seconds=run.prompt_seconds,
        decode_ms=1e3 * statistics.median(run.decode_seconds),
    )


def _steps(
    engine: Engine, helm: LocalHelm, requests: Sequence[GenerationRequest]
) -> Iterator[tuple[StepResult, ShardState, float]]:
    """Every step's result, what the shard held behind it, and how long it took."""
    for request in requests:
        helm.admit(request, None)
    batch: CachedBatch | None = None
    while True:
        started, seq = time.perf_counter(), helm.flush()
        if batch is None:
            result, signals = engine.prefill(1, requests, None, seq, 0)
        else:
            result, signals = engine.decode([batch.id], seq, 0)
        seconds = time.perf_counter() - started
        helm.observe(signals)
        for generation in result.generations:
            helm.take(generation)
        yield result, engine.state(), seconds
        batch = result.batch
        if batch is None:
            return


@dataclass(slots=True)
class _Run:
    """What is known so far of ``requests`` requests; ``together`` is the state behind the last step after which all of
    them were live."""

    requests: int
    read: int = 0
    together: ShardState = field(default_factory=ShardState)
    held_peak: int = 0
    logprobs: list[float] = field(default_factory=list)
    prompt_seconds: float = 0.0
    decode_seconds: list[float] = field(default_factory=list)

    def take(self, result: StepResult, state: ShardState, seconds: float) -> None:
        """Adds a step; it belongs to the prompts until all of them have been read."""
        live = len(result.batch.request_ids) if result.batch is not None else 0
        if self.read < self.requests:
            self.prompt_seconds += seconds
        elif live == self.requests:
            self.decode_seconds.append(seconds)
        self.held_peak = max(self.held_peak, _held(state))
        if live == self.requests:
            self.together = state
        for generation in result.generations:
            if generation.error is not None:
                raise GenerationFailed(generation.error.message)
            self.read += bool(generation.prefill_tokens)
            self.logprobs += [token.logprob for token in generation.prefill_tokens[1:]]


def _held(state: ShardState) -> int:
    return sum(usage.bytes for usage in state.kv)


def resident_now() -> int:
    """Resident bytes of this process."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since `restart_peak`."""
    return _status("VmHWM")


def restart_peak() -> int:
    """Forgets the peak so far; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_now()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

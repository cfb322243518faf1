"""A router over an engine in the same process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from chunkwise.config.settings import Limits
from chunkwise.core import (
    CachedBatch,
    GenerationRequest,
    ShardInfo,
    ShardState,
    SteeringUpdate,
    StepResult,
    StepSignals,
    WarmupLimits,
)
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.engine import Engine


@dataclass
class EngineShards:
    """The `Shards` protocol over one engine in this process."""

    engine: Engine
    decisions: DecisionTable
    sent: dict[int, StepSignals] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._session = self.decisions.start_session()

    async def info(self) -> ShardInfo:
        return self.engine.info()

    async def warmup(self, limits: Limits) -> WarmupLimits:
        return self.engine.warmup([], limits.step_tokens, None, None)

    async def prefill(
        self, requests: Sequence[GenerationRequest], batch_id: int, cached: CachedBatch | None, seq: int, step: int
    ) -> StepResult:
        return self._keep(self.engine.prefill(batch_id, requests, cached.id if cached else None, seq, step))

    async def decode(
        self, batches: Sequence[CachedBatch], seq: int, step: int, may_have_ended: bool = False
    ) -> StepResult:
        return self._keep(self.engine.decode([batch.id for batch in batches], seq, step, may_have_ended))

    async def filter_batch(self, batch_id: int, request_ids: Sequence[int], seq: int) -> CachedBatch:
        return self.engine.filter_batch(batch_id, request_ids, seq)

    async def clear_cache(self, batch_id: int | None, seq: int) -> None:
        self.engine.clear_cache(batch_id, seq)

    async def health(self) -> tuple[ShardState, ...]:
        return (self.engine.state(),)

    async def steer(self, update: SteeringUpdate) -> None:
        self.decisions.receive(self._session, update)

    async def signals(self, step: int) -> StepSignals:
        return self.sent.pop(step)

    async def close(self) -> None:
        pass

    def _keep(self, outcome: tuple[StepResult, StepSignals]) -> StepResult:
        result, signals = outcome
        self.sent[signals.step] = signals
        return result

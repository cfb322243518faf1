"""An `Engine` on a tiny model, and the calls that a generate.v3 router would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from chunkwise.config.settings import AdapterSource
from chunkwise.core import (
    CachedBatch,
    Generation,
    GenerationRequest,
    SamplingParams,
    SteeringUpdate,
    StepResult,
    StoppingParams,
    WarmupLimits,
)
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import Group, SingleProcess
from chunkwise.shard.adapters import load_adapters
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.engine import Engine, EngineSettings
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.tokenizer import Tokenizer

CPU = torch.device("cpu")


def request(id: int, text: str = "Hello there, General.", new: int = 8, **changes: object) -> GenerationRequest:
    """A greedy request of ``new`` tokens that ignores end of sequence."""
    base = GenerationRequest(id, text, SamplingParams(), StoppingParams(new, ignore_eos=True))
    return replace(base, **changes)  # type: ignore[arg-type]


class Driver:
    """An engine, warmed up, plus the texts and tokens it has produced by request id."""

    def __init__(
        self,
        model_dir: Path,
        adapters: dict[str, Path] | None = None,
        *,
        group: Group | None = None,
        total_tokens: int = 4096,
        prefill_tokens: int = 256,
        dtype: torch.dtype = torch.float32,
        prefix_caching: bool = True,
        prefill_logprobs: bool = False,
        adapter_slots: int | None = None,
    ) -> None:
        kernels = 1 if dtype == torch.float32 else None
        model = Llama(model_dir, group or SingleProcess(), dtype, CPU, kernel_threads=kernels)
        sources = [AdapterSource(name, str(path)) for name, path in (adapters or {}).items()]
        store = load_adapters(sources, model_dir, model.group, dtype, CPU, adapter_slots)
        self.decisions = DecisionTable(timeout_seconds=1.0)
        self._session = self.decisions.start_session()
        tokenizer = Tokenizer(model_dir)
        self.engine = Engine(
            model,
            tokenizer,
            store,
            self.decisions,
            GrammarCompiler(model_dir, tokenizer.eos_ids),
            EngineSettings(total_tokens, prefix_caching, prefill_logprobs),
        )
        self.limits: WarmupLimits = self.engine.warmup([request(0, "_test " * 8)], prefill_tokens, None, None)
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.errors: dict[int, str] = {}
        self._batch_ids = 0

    def steer(self, update: SteeringUpdate) -> None:
        """Sends an update of the current steering session."""
        self.decisions.receive(self._session, update)

    def restart_steering(self) -> None:
        """Opens a new steering session; updates count from 1 again."""
        self._session = self.decisions.start_session()

    def prefill(
        self, requests: Sequence[GenerationRequest], cached: CachedBatch | None = None, seq: int = 0
    ) -> StepResult:
        """Admits requests under a fresh batch id."""
        self._batch_ids += 1
        result, _ = self.engine.prefill(self._batch_ids, requests, cached.id if cached else None, seq, 0)
        return self._keep(result)

    def decode(self, *batches: CachedBatch, seq: int = 0) -> StepResult:
        """One step over cached batches."""
        result, _ = self.engine.decode([batch.id for batch in batches], seq, 0)
        return self._keep(result)

    def run(self, *requests: GenerationRequest, seq: int = 0) -> dict[int, list[int]]:
        """Serves requests together to the end; the tokens of each."""
        batch = self.prefill(requests, seq=seq).batch
        while batch is not None:
            batch = self.decode(batch, seq=seq).batch
        return {r.id: self.tokens.get(r.id, []) for r in requests}

    def _keep(self, result: StepResult) -> StepResult:
        self.engine.check_integrity()
        for generation in result.generations:
            self._record(generation)
        return result

    def _record(self, generation: Generation) -> None:
        if generation.error is not None:
            self.errors[generation.request_id] = generation.error.message
            return
        self.tokens.setdefault(generation.request_id, []).append(generation.token.id)
        if generation.text is not None:
            self.texts[generation.request_id] = generation.text.text

"""The serving stack in one process, without sockets: a shard's engine under the router's steering controller.

Kernels, scheduler, sampler, ladder, KV cache and controller are those of the server, and signals reach the controller
with the server's lag of one step, so ranks, cross-fades and KV formats are what the server would run. How to use it::

    evaluator = load_evaluator(EngineChoice("MODEL_DIR", AdapterSource("squad", "ADAPTER_DIR")))
    mode = fixed_rung(4, evaluator.adapters["squad"])
    outcomes = evaluator.run([Job("a", tuple(evaluator.tokenizer.encode("Context: …")), max_new_tokens=32)], mode)

To compare ladders of one adapter, load `Llama` once and build one `Evaluator` per `AdapterStore` with `make_engine`.
The driver knows nothing of data sets and metrics; log-likelihoods are `nll`'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
from torch import Tensor

from chunkwise.config.eval_settings import EngineChoice
from chunkwise.config.settings import ShardSettings
from chunkwise.core import (
    AdapterInfo,
    Generation,
    GenerationRequest,
    InvalidRequest,
)
from chunkwise.evaluation.helm import LocalHelm
from chunkwise.evaluation.jobs import Job, Outcome, PartialOutcome
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.trace import Watcher
from chunkwise.hub import locate
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import SingleProcess
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.engine import PAGE_SIZE, Engine, EngineSettings
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.shard.process import load_engine
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.store import AdapterStore


class Evaluator:
    """Runs jobs in batches on one engine.

    Jobs are grouped in their order and every group is run to its end before the next, so that what an item gives
    depends on its group alone: a run that was interrupted goes on as if it had not been.

    Args:
        engine: with a prefix cache that is off, for the same reason, and prompt logprobs on; see `make_engine`.
        decisions: the engine's table.
        tokenizer: the model's.
        batch_tokens, step_tokens: as in `EngineChoice`; the engine's KV cache must have been sized for the former.

    Attributes:
        dtype: of weights and KV cache, by torch's name.
        pool_bytes: bytes of KV pages held after every step so far.
    """

    def __init__(
        self, engine: Engine, decisions: DecisionTable, tokenizer: Tokenizer, batch_tokens: int, step_tokens: int
    ) -> None:
        self._engine = engine
        self._decisions = decisions
        self._watcher = Watcher(engine.state)
        self._limits = engine.warmup([], step_tokens, None, None)
        # One page stays spare, as for a router.
        self._batch_tokens = min(batch_tokens, self._limits.max_supported_total_tokens - PAGE_SIZE)
        self._ids = itertools.count(1)
        self.tokenizer = tokenizer
        self.dtype = engine.info().dtype
        self.pool_bytes = self._watcher.pool_bytes
        engine.watch(self._watcher)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """What steering knows of the adapters that are resident now, by name."""
        return {adapter.adapter_id: adapter for adapter in self._engine.info().adapters}

    def groups(self, jobs: SequenceOf[Job]) -> list[list[Job]]:
        """The jobs in order, cut so that each group fits the KV cache with its longest answers.

        Raises:
            InvalidRequest: a job that is longer than the model or the cache allows.
        """
        groups: list[list[Job]] = []
        room = 0
        for job in jobs:
            needed = self._positions(job)
            if needed > room or not groups:
                groups.append([])
                room = self._batch_tokens
            groups[-1].append(job)
            room -= needed
        return groups

    def run(self, jobs: SequenceOf[Job], mode: SteeringMode) -> list[Outcome]:
        """Runs jobs, however many, and returns their outcomes in the same order. Raises as `groups` and `run_group`."""
        return [outcome for group in self.groups(jobs) for outcome in self.run_group(group, mode)]

    def run_group(self, jobs: SequenceOf[Job], mode: SteeringMode) -> list[Outcome]:
        """Runs one of the `groups` at once and returns the outcomes in its order.

        Raises:
            GenerationFailed: a job cannot be run; the message names it.
        """
        helm = LocalHelm(self._decisions, mode.policy, PAGE_SIZE)
        answers: dict[int, PartialOutcome] = {}
        requests: list[GenerationRequest] = []
        adapter = self.adapters.get(mode.adapter) if mode.adapter is not None else None
        for job in jobs:
            request = job.request(next(self._ids), mode.adapter)
            requests.append(request)
            answers[request.id] = PartialOutcome(job)
            helm.admit(request, adapter)
        try:
            for generation in self._generations(requests, helm):
                answers[generation.request_id].take(generation)
            return [answer.complete(self._watcher.take(id)) for id, answer in answers.items()]
        finally:
            self._engine.clear_cache(None)
            self._watcher.forget()

    def watch_scored(self, observe: Callable[[Tensor], None] | None) -> None:
        """Calls ``observe`` with the logits [n, vocabulary] behind the prompt logprobs of every job that asks for them;
        of a group of one job they come in order of position."""
        self._engine.watch_scored(observe)

    def _generations(self, requests: SequenceOf[GenerationRequest], helm: LocalHelm) -> Iterator[Generation]:
        result, signals = self._engine.prefill(requests[0].id, requests, None, helm.flush(), 0)
        while True:
            helm.observe(signals)
            for generation in result.generations:
                yield generation
                helm.take(generation)
            if result.batch is None:
                return
            result, signals = self._engine.decode([result.batch.id], helm.flush(), 0)

    def _positions(self, job: Job) -> int:
        """KV positions that a job may take, in whole pages."""
        needed = len(job.prompt_ids) + job.new_tokens
        most = min(self._limits.max_total_tokens, self._batch_tokens)
        if needed > most:
            raise InvalidRequest(
                f"item {job.key!r} has {len(job.prompt_ids)} prompt tokens and up to {job.new_tokens} more; the limit "
                f"is {most} together; raise --batch-tokens up to the model's positions, or leave the item out"
            )
        return math.ceil(needed / PAGE_SIZE) * PAGE_SIZE


def make_engine(
    model_dir: Path, model: Llama, adapters: AdapterStore, batch_tokens: int
) -> tuple[Engine, DecisionTable]:
    """An engine for an `Evaluator` over a model that is loaded already; several may share one model."""
    decisions, tokenizer = DecisionTable(), Tokenizer(model_dir)
    settings = EngineSettings(max_batch_total_tokens=batch_tokens, prefix_caching=False, prefill_logprobs=True)
    grammars = GrammarCompiler(model_dir, tokenizer.eos_ids)
    return Engine(model, tokenizer, adapters, decisions, grammars, settings), decisions


def load_evaluator(choice: EngineChoice) -> Evaluator:
    """An evaluator over a model and at most one adapter, loaded as ``chunkwise shard`` loads them.

    Raises:
        UnsupportedModel: the checkpoint or the adapter cannot be served.
    """
    settings = ShardSettings(
        model_id=choice.model_id,
        urls=(),
        dtype=choice.dtype,
        quantize=choice.quantize,
        adapters=(choice.adapter,) if choice.adapter is not None else (),
        max_batch_total_tokens=choice.batch_tokens,
        prefix_caching=False,
        prefill_logprobs=True,
        threads=choice.threads,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decisions = DecisionTable()
    engine = load_engine(settings, SingleProcess(), device, decisions)
    tokenizer = Tokenizer(locate(choice.model_id, None))
    return Evaluator(engine, decisions, tokenizer, choice.batch_tokens, choice.step_tokens)

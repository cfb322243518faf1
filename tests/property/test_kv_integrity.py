"""Ten thousand random calls on an engine that is short of memory: after each, every page has the holders it should
have, and holds what it should hold."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
import torch

from chunkwise.core import (
    CachedBatch,
    GenerationRequest,
    KvDecision,
    KvFormat,
    KvScorer,
    SamplingParams,
    SteeringUpdate,
    StepResult,
    StoppingParams,
)
from chunkwise.kv.cache import KvCache, KvShape, plan_gather
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import SingleProcess
from chunkwise.model.spec import load_spec
from chunkwise.model.step import StepInput, StepOutput
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.engine import PAGE_SIZE, Engine, EngineSettings
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.shard.sequence import Sequence
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.store import AdapterStore
from conftest import TinyWorld
from serving import CPU

CALLS = 10_000
PAGES = 26
MOST_LIVE = 7


def _next(id: int, position: int) -> int:
    """The token that the stub's model puts after another."""
    return (7 * id + 13 * position + 5) % 251


class StubModel:
    """Keeps a token's position as its key and its id as its value, and likes one next token best."""

    storage = dtype = torch.float32
    device = CPU
    group = SingleProcess()

    def __init__(self, world: TinyWorld) -> None:
        self.spec = load_spec(world.model)

    def kv_shape(self, page_size: int) -> KvShape:
        return KvShape(layers=1, heads=1, head_dim=2, page_size=page_size)

    def forward(self, step: StepInput, cache: KvCache) -> StepOutput:
        keys, values = (x.float()[:, None, None].expand(-1, 1, 2) for x in (step.positions + 1, step.ids))
        cache.write(0, step.slots, keys, values)
        logits = torch.zeros(len(step.spans), self.spec.vocab)
        for row, last in enumerate(step.last_rows.tolist()):
            logits[row, _next(int(step.ids[last]), int(step.positions[last]))] = 1.0
        return StepOutput(logits, torch.zeros(0), None)


@dataclass
class Client:
    """One request as a router sees it."""

    request: GenerationRequest
    kv: tuple[KvDecision, ...]
    tokens: list[int] = field(default_factory=list)
    seen: int = 0


class World:
    """The engine, its clients, and one random call after another."""

    def __init__(self, tiny: TinyWorld, seed: int) -> None:
        self.random = random.Random(seed)
        self.decisions = DecisionTable(timeout_seconds=1.0)
        self.session = self.decisions.start_session()
        self.seq = 0
        tokenizer, model = Tokenizer(tiny.model), cast("Llama", StubModel(tiny))
        self.engine = Engine(
            model,
            tokenizer,
            AdapterStore(None, torch.float32, CPU),
            self.decisions,
            GrammarCompiler(tiny.model, tokenizer.eos_ids),
            EngineSettings(PAGES * PAGE_SIZE),
        )
        self.engine.warmup([], 64, None, None)
        self.engine.watch(self._observe)
        self.live: dict[int, Client] = {}
        self.batches: dict[int, CachedBatch] = {}
        self.prefixes = [[self.random.randrange(251) for _ in range(200)] for _ in range(3)]
        self.ids = 0
        self.counts: Counter[str] = Counter()
        self.last = ""

    def call(self) -> None:
        """One random call."""
        choices = ["admit"] * (2 if len(self.live) < MOST_LIVE else 0)
        if self.batches:
            choices += ["decode"] * 8 + ["steer"] * 3 + ["filter", "preempt"]
            if self.random.random() < 0.1:
                choices += ["clear"]
        self.last = self.random.choice(choices or ["admit"])
        self.counts[self.last] += 1
        getattr(self, f"_{self.last}")()

    def _admit(self) -> None:
        self.ids += 1
        prompt = self.random.choice(self.prefixes)[: self.random.randint(1, 150)]
        if self.random.random() < 0.3:
            prompt = [*prompt, self.random.randrange(251)]
        new = self.random.randint(1, 60)
        request = GenerationRequest(
            self.ids, "", SamplingParams(), StoppingParams(new, ignore_eos=True), prompt_ids=tuple(prompt)
        )
        self._start(Client(request, self._plan(self.ids, len(prompt) + new)))

    def _plan(self, id: int, length: int) -> tuple[KvDecision, ...]:
        made, start = [], self.random.randint(0, 40)
        while self.random.random() < 0.7 and start < length:
            end = start + self.random.randint(1, 70)
            made.append(self._decision(id, start, end, end + self.random.randint(0, 20)))
            start = end
        return tuple(made)

    def _decision(self, id: int, start: int, end: int, effective: int) -> KvDecision:
        kind, scorer = self.random.choice(list(KvFormat)), self.random.choice(list(KvScorer))
        return KvDecision(id, start, end, kind, self.random.choice([0, 0, 30, 50, 100]), scorer, effective)

    def _start(self, client: Client) -> None:
        """Sends a request with its decisions, to a batch of its own or to one that runs."""
        self.live[client.request.id] = client
        joined = self.random.choice([None, *self.batches.values()])
        if joined is not None:
            del self.batches[joined.id]
        self._send(client.kv)
        self.ids += 1
        result, _ = self.engine.prefill(self.ids, [client.request], joined.id if joined else None, self.seq, 0)
        self._take(result)

    def _decode(self) -> None:
        chosen = self.random.sample(list(self.batches), self.random.randint(1, len(self.batches)))
        for id in chosen:
            del self.batches[id]
        result, _ = self.engine.decode(chosen, self.seq, 0)
        self._take(result)

    def _steer(self) -> None:
        """A decision about what is computed, now; some are refused because an earlier one asked for as much."""
        client = self.random.choice(list(self.live.values()))
        if client.seen > 1:
            end = self.random.randint(1, client.seen)
            self._send((self._decision(client.request.id, self.random.randrange(end), end, 0),))
        self._decode()

    def _filter(self) -> None:
        batch = self.random.choice(list(self.batches.values()))
        keep = [id for id in batch.request_ids if self.random.random() < 0.6]
        for id in set(batch.request_ids) - set(keep):
            del self.live[id]
        del self.batches[batch.id]
        kept = self.engine.filter_batch(batch.id, keep, self.seq)
        if kept.request_ids:
            self.batches[batch.id] = kept

    def _preempt(self) -> None:
        """Takes a request out of its batch and reads it again, prompt and answer, as a new one with the same plan."""
        client = self.random.choice(list(self.live.values()))
        (batch,) = (batch for batch in self.batches.values() if client.request.id in batch.request_ids)
        del self.batches[batch.id]
        kept = self.engine.filter_batch(batch.id, [id for id in batch.request_ids if id != client.request.id], self.seq)
        if kept.request_ids:
            self.batches[batch.id] = kept
        del self.live[client.request.id]
        self.ids += 1
        left = client.request.stopping.max_new_tokens - len(client.tokens)
        request = replace(
            client.request,
            id=self.ids,
            prompt_ids=(*(client.request.prompt_ids or ()), *client.tokens),
            stopping=StoppingParams(left, ignore_eos=True),
        )
        self._start(Client(request, tuple(replace(decision, request_id=self.ids) for decision in client.kv)))

    def _clear(self) -> None:
        self.engine.clear_cache(None)
        self.live.clear()
        self.batches.clear()

    def _send(self, kv: tuple[KvDecision, ...]) -> None:
        if kv:
            self.seq += 1
            self.decisions.receive(self.session, SteeringUpdate(self.seq, kv=kv))

    def _take(self, result: StepResult) -> None:
        if result.batch is not None:
            self.batches[result.batch.id] = result.batch
        for generation in result.generations:
            client = self.live[generation.request_id]
            if generation.error is not None:
                self.counts["full" if "KV cache is full" in generation.error.message else "refused"] += 1
            else:
                last = [*(client.request.prompt_ids or ()), *client.tokens]
                assert generation.token.id == _next(last[-1], len(last) - 1)
                client.tokens.append(generation.token.id)
            if generation.text is not None:
                self.counts["ended"] += 1
                del self.live[generation.request_id]

    def _observe(self, sequences: SequenceOf[Sequence]) -> None:
        cache = self.engine._require_runner().cache
        for sequence in sequences:
            self.live[sequence.request.id].seen = sequence.computed
            if sequence.computed and self.random.random() < 0.2:
                self._look(cache, sequence)

    def _look(self, cache: KvCache, sequence: Sequence) -> None:
        """Whether the pages hold the sequence's own tokens, in order; exactly, where it kept them all as they were."""
        slots = sequence.slot(sequence.computed)
        keys, values = (x[:slots, 0, 0] for x in cache.gather(0, plan_gather(sequence.pages, CPU)))
        if any(page.format is not KvFormat.FULL for page in sequence.pages):
            self.counts["looked at small"] += 1
            assert ((keys > -20) & (keys < sequence.computed + 20)).all()
            return
        positions = (keys - 1).long()
        assert (positions.diff() > 0).all()
        assert int(positions[-1]) == sequence.computed - 1
        assert values.long().tolist() == [sequence.ids[position] for position in positions.tolist()]
        self.counts["looked at dropped" if sequence.kv.dropped else "looked"] += 1


@pytest.mark.parametrize("seed", [1])
def test_random_calls_keep_the_books(tiny: TinyWorld, seed: int) -> None:
    world = World(tiny, seed)
    for _ in range(CALLS):
        world.call()
        world.engine.check_integrity()
    often = {"admit", "decode", "steer", "filter", "preempt", "clear", "full", "refused", "ended", "looked"}
    assert {name for name in often if world.counts[name] < 20} == set(), world.counts
    state = world.engine.state()
    assert state.kv_rewritten_pages > 1000
    assert state.kv_dropped_tokens > 1000
    assert state.reused_tokens > 1000
    world.engine.clear_cache(None)
    cache = world.engine._require_runner().cache
    cache.prefix.clear()
    cache.allocator.check_integrity([])
    assert cache.allocator.bytes_held == 0

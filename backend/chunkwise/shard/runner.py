"""One step over a list of sequences: decisions, schedule, pages, forward, choice of tokens. Knows nothing of batches
or RPCs. Every failure that concerns one sequence ends that sequence alone."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from chunkwise.core import (
    ChunkwiseError,
    FinishReason,
    GeneratedText,
    Generation,
    GenerationFailed,
    InvalidRequest,
    KvDecision,
    KvFormat,
    RequestError,
    SequenceSignals,
    Token,
)
from chunkwise.kv.cache import KvCache
from chunkwise.model.llama import Llama
from chunkwise.model.step import StepOutput
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.packing import pack
from chunkwise.shard.readings import Readings, read_logits
from chunkwise.shard.retention import kept_pages
from chunkwise.shard.scheduler import Span, schedule
from chunkwise.shard.sequence import PrefixTrail, Sequence
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.errors import AdapterError


@dataclass(slots=True)
class StepOutcome:
    """What one step produced. ``ended`` are the sequences that finished or failed in it."""

    generations: list[Generation] = field(default_factory=list)
    signals: list[SequenceSignals] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)
    forward_ns: int = 0
    decode_ns: int = 0


def failure(request_id: int, error: Exception, eos_id: int, text: str = "", generated: int = 1) -> Generation:
    """The Generation that ends one request with an error; a peer that ignores the error sees an ordinary end."""
    kind = "validation" if isinstance(error, InvalidRequest) else "generation"
    return Generation(
        request_id,
        Token(eos_id, 0.0, "", special=True),
        text=GeneratedText(text, generated, FinishReason.EOS_TOKEN),
        error=RequestError(str(error), kind),
    )


class StepRunner:
    """Runs steps of one model on one cache.

    Args:
        budget: the most tokens one step may compute.
    """

    def __init__(
        self, model: Llama, cache: KvCache, tokenizer: Tokenizer, decisions: DecisionTable, budget: int
    ) -> None:
        self._model = model
        self._cache = cache
        self._tokenizer = tokenizer
        self._decisions = decisions
        self.budget = budget
        self._eos_id = min(tokenizer.eos_ids, default=0)

    @property
    def cache(self) -> KvCache:
        """The cache whose pages the sequences hold."""
        return self._cache

    def step(self, sequences: SequenceOf[Sequence]) -> StepOutcome:
        """Advances the sequences by one step. Ended ones keep their pages until `release`."""
        outcome = StepOutcome()
        steered = [s for s in sequences if self._guarded(outcome, s, self._follow_decisions)]
        spans = [
            span
            for span in schedule(steered, self.budget)
            if self._guarded(outcome, span.sequence, self._reserve, span.context)
        ]
        if not spans:
            return outcome
        start = time.perf_counter_ns()
        page_size = self._cache.shape.page_size
        step = pack(spans, page_size, self._model.device)
        output = self._model.forward(step, self._cache)
        outcome.forward_ns = time.perf_counter_ns() - start
        self._advance(spans, output, outcome)
        outcome.decode_ns = time.perf_counter_ns() - start - outcome.forward_ns
        return outcome

    def reuse_prefix(self, sequence: Sequence) -> None:
        """Gives a new sequence the pages of its prompt that an earlier request computed alike, none behind the position
        of its first KV decision; at least the prompt's last token is left to compute. Raises as `Sequence.follow` and
        `Retention.accept`."""
        sequence.follow(self._decisions.take_chunks(sequence.request.id), self._decisions.table)
        for decision in self._decisions.take_kv(sequence.request.id):
            sequence.kv.accept(decision, sequence.computed)
        if sequence.request.prefill_logprobs:
            return
        size, prefix = self._cache.shape.page_size, self._cache.prefix
        adapter_hash = sequence.adapter.content_hash if sequence.adapter is not None else None
        reusable = min(sequence.computable, len(sequence.ids) - 1) // size
        keys = [sequence.page_key(place, size) for place in range(reusable)]
        nodes = prefix.match(adapter_hash, keys)
        sequence.pages = [node.page for node in nodes if node.page is not None]
        sequence.computed = len(nodes) * size
        sequence.trail = PrefixTrail(nodes[-1] if nodes else prefix.root(adapter_hash), len(nodes))

    def release(self, sequence: Sequence) -> None:
        """Returns the pages of a sequence and forgets its steering decisions."""
        self._cache.release(sequence.pages)
        sequence.pages.clear()
        self._decisions.forget(sequence.request.id)

    def _guarded(self, outcome: StepOutcome, sequence: Sequence, act: Callable[..., None], *args: int) -> bool:
        """Runs ``act`` on one sequence; an error of ours ends that sequence and is reported for it alone."""
        try:
            act(sequence, *args)
        except (ChunkwiseError, AdapterError) as error:
            outcome.ended.append(sequence)
            text, generated = sequence.detokenizer.text, max(sequence.generated, 1)
            outcome.generations.append(failure(sequence.request.id, error, self._eos_id, text, generated))
            return False
        return True

    def _follow_decisions(self, sequence: Sequence) -> None:
        """Checks new decisions and rewrites the pages whose KV policy takes effect now."""
        request_id = sequence.request.id
        sequence.follow(self._decisions.take_chunks(request_id), self._decisions.table)
        for decision in self._decisions.take_kv(request_id):
            sequence.kv.accept(decision, sequence.computed)
        for decision in sequence.kv.take_due(sequence.computed):
            self._rewrite(sequence, decision)

    def _rewrite(self, sequence: Sequence, decision: KvDecision) -> None:
        size = self._cache.shape.page_size
        before = list(sequence.pages)
        grant = sequence.kv.grant(decision, len(sequence.pages), size)
        for place, kind in grant.shared.items():
            sequence.pages[place : place + 1] = self._cache.compress([sequence.pages[place]], kind)
        old = sequence.pages[grant.whole]
        kept = kept_pages(len(old), decision.drop_percent)
        if kept == len(old):
            sequence.pages[grant.whole] = self._cache.compress(old, decision.format)
        else:
            kind = max(decision.format, *(page.format for page in old))
            packed = self._cache.pack(old, kind, kept, decision.scorer)
            if packed is not None:
                sequence.pages[grant.whole] = packed
                sequence.kv.drop(grant.whole, kept, size)
        if sequence.pages != before:
            # What follows is computed over other keys than a prompt gives, which no other request starts from.
            sequence.trail = None

    def _reserve(self, sequence: Sequence, context: int) -> None:
        while len(sequence.pages) * self._cache.shape.page_size < sequence.slot(context):
            sequence.pages.append(self._cache.allocate(KvFormat.FULL))

    def _advance(self, spans: SequenceOf[Span], output: StepOutput, outcome: StepOutcome) -> None:
        self._score_prompts(spans, output.scores)
        readings = read_logits(output.logits)
        spreads = output.attention_spread.tolist() if output.attention_spread is not None else None
        for i, span in enumerate(spans):
            sequence = span.sequence
            completes = span.completes
            sequence.computed = span.context
            if not math.isfinite(readings.entropies[i]):
                self._cache.scrub(sequence.pages)
                self._guarded(outcome, sequence, _fail_not_finite)
                continue
            spread = spreads[i] if spreads is not None else None
            entropy = readings.entropies[i]
            outcome.signals.append(SequenceSignals(sequence.request.id, sequence.computed - 1, entropy, spread))
            self._keep_pages(sequence)
            if completes:
                choose = partial(self._choose, row=i, logits=output.logits, readings=readings, outcome=outcome)
                self._guarded(outcome, sequence, choose)

    def _keep_pages(self, sequence: Sequence) -> None:
        """Puts pages that have become complete into the prefix cache: those of the prompt, and those of the answer if
        it is not steered. How an answer is steered follows from signals that a prompt does not have, so nobody could
        reuse its pages."""
        size = self._cache.shape.page_size
        end = min(sequence.computed, sequence.prompt_tokens) if sequence.chunks else sequence.computed
        while sequence.trail is not None and (sequence.trail.pages + 1) * size <= end:
            place = sequence.trail.pages
            key = sequence.page_key(place, size)
            node, sequence.pages[place] = self._cache.prefix.insert(sequence.trail.node, key, sequence.pages[place])
            sequence.trail = PrefixTrail(node, place + 1)

    def _score_prompts(self, spans: SequenceOf[Span], scores: Tensor) -> None:
        """Hands out the prompt logprobs of this step, in the order in which `pack` asked for them."""
        values = iter(scores.tolist())
        for span in spans:
            sequence = span.sequence
            if sequence.request.prefill_logprobs:
                wanted = min(span.context, sequence.prompt_tokens - 1) - sequence.computed
                sequence.prompt_logprobs.extend(itertools.islice(values, max(wanted, 0)))

    def _choose(self, sequence: Sequence, row: int, logits: Tensor, readings: Readings, outcome: StepOutcome) -> None:
        top: tuple[Token, ...] = ()
        if sequence.chooser.takes_likeliest and not sequence.request.top_n_tokens:
            id, logprob = readings.likeliest[row], readings.logprobs[row]
        else:
            id, log_p = sequence.chooser.choose(logits[row])
            logprob, top = float(log_p[id]), self._top_tokens(log_p, sequence.request.top_n_tokens)
        sequence.ids.append(id)
        text = sequence.detokenizer.append(id)
        token = Token(id, logprob, text, self._tokenizer.is_special(id))
        reason = self._finish_reason(sequence, id)
        ending = None
        if reason is not None:
            sampling = sequence.request.sampling
            seed = sampling.seed if sampling.samples else None
            held, full = self._bytes(sequence)
            ending = GeneratedText(sequence.detokenizer.text, sequence.generated, reason, seed, held, full)
            outcome.ended.append(sequence)
        prefill = self._prefill_tokens(sequence) if sequence.generated == 1 else ()
        outcome.generations.append(Generation(sequence.request.id, token, ending, top, prefill_tokens=prefill))

    def _bytes(self, sequence: Sequence) -> tuple[int, int]:
        """What a sequence's pages take, and what its computed tokens would take in full."""
        sizes = self._cache.allocator.page_bytes
        full = -(-sequence.computed // self._cache.shape.page_size) * sizes[KvFormat.FULL]
        return sum(sizes[page.format] for page in sequence.pages), full

    def _prefill_tokens(self, sequence: Sequence) -> tuple[Token, ...]:
        """The prompt with its logprobs, if asked for. The first token has none: NaN."""
        if not sequence.request.prefill_logprobs:
            return ()
        return tuple(
            Token(id, logprob, self._tokenizer.decode([id]), self._tokenizer.is_special(id))
            for id, logprob in zip(sequence.ids, [math.nan, *sequence.prompt_logprobs], strict=False)
        )

    def _finish_reason(self, sequence: Sequence, id: int) -> FinishReason | None:
        """TGI's order: length, then end of sequence, then stop sequences."""
        stopping = sequence.request.stopping
        if sequence.generated >= stopping.max_new_tokens:
            return FinishReason.LENGTH
        if not stopping.ignore_eos and id in self._tokenizer.eos_ids:
            return FinishReason.EOS_TOKEN
        return FinishReason.STOP_SEQUENCE if sequence.detokenizer.stopped else None

    def _top_tokens(self, log_p: Tensor, n: int) -> tuple[Token, ...]:
        """The n most likely tokens in descending order, with those that tie with the n-th; n is clamped to V."""
        if n == 0:
            return ()
        last = log_p.topk(min(n, log_p.shape[-1])).values[-1]
        count = int((log_p >= last).sum().item()) if last > -torch.inf else n
        values, ids = log_p.topk(min(count, log_p.shape[-1]))
        return tuple(
            Token(id, value, self._tokenizer.decode([id]), self._tokenizer.is_special(id))
            for id, value in zip(ids.tolist(), values.tolist(), strict=True)
        )


def _fail_not_finite(sequence: Sequence) -> None:
    adapter = sequence.request.adapter_id
    source = f"adapter {adapter!r}" if adapter else "the base model"
    raise GenerationFailed(f"the model produced values that are not finite; check the weights of {source}")

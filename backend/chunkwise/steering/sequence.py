"""Steering of one request: from its tokens and signals to its chunks, their ranks and their KV formats.

It knows nothing of other requests, of updates or of their numbering; `controller` adds those.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from chunkwise.config.policy import SteeringPolicy
from chunkwise.core import Chunk, ChunkDecision, KvDecision, SequenceSignals, SteeringViolation
from chunkwise.steering.chunker import Chunker
from chunkwise.steering.estimator import ComplexityEstimator, Observation
from chunkwise.steering.kv_policy import KvChoice
from chunkwise.steering.kv_schedule import KvSchedule
from chunkwise.steering.plans import PlannedChunk, RankPlan
from chunkwise.steering.ranks import RankChoice, RankSelector
from chunkwise.steering.report import ChunkReport, SteeringReport
from chunkwise.steering.signals import NgramNovelty, positional_prior

# The signals of position p are consumed while the step of p + 1 runs; the next step to be steered computes p + 2.
DECODE_LEAD = 2

_NO_ADAPTER = RankChoice(rung=None, active_rank=0.0, scale=1.0)


@dataclass(slots=True)
class _SteeredChunk:
    """A chunk as decided: ``level`` is the complexity that chose its rank. It ends where the next one starts."""

    start: int
    level: float
    choice: RankChoice
    crossfade: int


class SteeredSequence:
    """One request from admission to release.

    The prompt is cut whole at construction, by novelty and positional prior; its last chunk stays open and runs on into
    the answer, which is cut by the model's signals as well. Under a `RankPlan` these cuts are for the KV cache alone:
    there are further ones where the plan changes the rank, and no rank follows from a signal. A `RankSelector` gives
    each prompt chunk a rank by the mean complexity of its own tokens; a chunk opened in decode cannot know its tokens
    yet and takes it from `Chunker.recent`, the exponential mean over the last few tokens.

    Args:
        ranks: how ranks are chosen; None without an adapter.
        table: the number of the rung table that holds the plan's answer tokens; 0: none.
        page_size: tokens in a page of the KV cache.
        compressed: whether the KV policy applies from the start, even if it waits for pressure.

    Raises:
        ValueError: ``prompt_ids`` is empty.
    """

    def __init__(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        policy: SteeringPolicy,
        ranks: RankPlan | RankSelector | None,
        *,
        table: int = 0,
        page_size: int = 1,
        compressed: bool = False,
    ) -> None:
        if not prompt_ids:
            raise ValueError(f"request {request_id} has an empty prompt; a request needs at least one token")
        self._request_id = request_id
        self._prompt_length = len(prompt_ids)
        self._policy = policy
        self._ranks = ranks
        self._planned: list[PlannedChunk] = []
        self._table = table
        self._answer_tokens: Mapping[int, RankChoice] = {}
        self._answer_ranks = array("d", (0.0,))
        self._novelty = NgramNovelty(policy.estimator.ngram)
        self._estimator = ComplexityEstimator(policy.estimator)
        self._chunker = Chunker(policy.chunker)
        self._kv = KvSchedule(request_id, len(prompt_ids), policy.kv, page_size, compressed)
        self._chunks: list[_SteeredChunk] = []
        self._closed = 0
        self._replayed = 0
        self._computed = 0
        self._generated = 0
        self._unobserved: deque[int] = deque()
        self._plan(prompt_ids)

    @property
    def computed(self) -> int:
        """Number of leading positions known to be computed: from signals, or from the tokens generated after them."""
        return max(self._computed, self._prompt_length + self._generated - 1 if self._generated else 0)

    @property
    def compressed(self) -> bool:
        """Whether its chunks are compressed as they leave the recent window."""
        return self._kv.compressed

    def compress(self) -> None:
        """Has its chunks compressed from now on: those of an answer with the next step, those of a prompt that is not
        computed yet, whose progress is unknown here, where the answer begins."""
        self._kv.compress(self._prompt_length + max(self._generated - 1, 0))

    def decisions(self) -> list[ChunkDecision]:
        """The decisions of the chunks so far, in order; under a plan, of those at which it changes the rank. None
        without an adapter."""
        if self._ranks is None:
            return []
        changes = {chunk.start for chunk in self._planned}
        return [self._decision(chunk) for chunk in self._chunks if not changes or chunk.start in changes]

    def resume(self) -> list[KvDecision]:
        """The request was pre-empted and is computed anew, from the beginning to its newest token. Returns the KV
        decisions made so far, to be sent again together with all `decisions`; nothing is steered anew before signals
        come of positions that had none."""
        if not self._generated:
            self._computed = 0
            return list(self._kv.made)
        computed = self._prompt_length + self._generated - 1
        # Signals of the newest positions are missing if a step of other requests has failed meanwhile.
        while self._computed < computed:
            position = max(self._computed, self._prompt_length - 1)
            self.observe(SequenceSignals(self._request_id, position, entropy=math.nan))
        self._replayed = computed
        return list(self._kv.made)

    def extend(self, token_id: int) -> None:
        """Takes the next generated token. The router does this between two steps, so nothing is worked out here."""
        self._unobserved.append(token_id)
        self._generated += 1
        if self._table:
            self._add_answer_rank(token_id)

    def observe(self, signals: SequenceSignals) -> ChunkDecision | None:
        """Takes the signals of the newest computed position; returns the decision they led to, if any.

        Within the prompt they only tell how far it has got: in how many pieces a prompt is computed follows from who
        shares the step, and neither rank nor compression may follow from that. From the last prompt token on they are
        one per position p, and a chunk opened by them starts at p + `DECODE_LEAD`. Positions that are computed anew
        after `resume` tell nothing.

        Raises:
            SteeringViolation: the position does not follow the one before, or its token has not been given yet.
        """
        position = signals.position
        if position < self._replayed:
            return None
        self._check_order(position)
        self._computed = position + 1
        if position < self._prompt_length - 1:
            return None
        if position == self._prompt_length - 1:
            # Its complexity was planned without the model's signals. (The normalisation of novelty and position counts
            # this one token twice, which cannot be seen beside `inertia`.)
            self._chunker.retract()
            novelty = self._last_of_prompt
        else:
            novelty = self._novelty.push(self._unobserved.popleft())
        complexity = self._estimator.estimate(
            Observation(
                entropy=signals.entropy,
                novelty=novelty,
                attention=signals.attention_spread,
                position=positional_prior(position, self._prompt_length, self._policy.estimator),
            )
        )
        start = self._chunker.push(complexity, DECODE_LEAD)
        if start is None:
            return None
        chunk = self._open(start, self._chunker.recent)
        return self._decision(chunk) if isinstance(self._ranks, RankSelector) else None

    def due_kv(self, ahead: bool = False) -> list[KvDecision]:
        """KV decisions to be sent before the next step: those of the prompt on the first call, then those that take
        effect at the position which that step computes. Each is given once.

        That position follows from the number of tokens that are generated before the step, which is the same at the
        same step of a request; with ``ahead`` a step still runs that generates one more. Signals do not come later than
        that, but sooner if steps of other batches lie in between.
        """
        generated = self._generated + ahead
        self._close(self._prompt_length + max(generated - DECODE_LEAD, 0))
        return self._kv.advance(self._prompt_length + max(generated - 1, 0))

    def report(self, length: int) -> SteeringReport:
        """The chunks of the first ``length`` positions; the last one is cut there."""
        reports: list[ChunkReport] = []
        ends = [*(chunk.start for chunk in self._chunks[1:]), length]
        for chunk, end in zip(self._chunks, ends, strict=True):
            if chunk.start >= length:
                break
            reports.append(self._chunk_report(chunk, min(end, length), self._kv.effect(end, length)))
        ranked = sum((chunk.end - chunk.start) * chunk.rank for chunk in reports)
        return SteeringReport(tuple(reports), ranked / length if length > 0 else 0.0)

    def _plan(self, prompt_ids: Sequence[int]) -> None:
        starts = [0]
        novelty = 1.0
        for position, token_id in enumerate(prompt_ids):
            novelty = self._novelty.push(token_id)
            prior = positional_prior(position, self._prompt_length, self._policy.estimator)
            start = self._chunker.push(self._estimator.estimate(Observation(novelty=novelty, position=prior)))
            if start is not None:
                starts.append(start)
        self._last_of_prompt = novelty
        if self._ranks is not None and not isinstance(self._ranks, RankSelector):
            self._planned = self._ranks.chunks(prompt_ids)
            self._answer_tokens = self._ranks.answer_tokens
            starts = sorted({*starts, *(chunk.start for chunk in self._planned)})
            self._chunker.start = starts[-1]
            if self._table:
                self._add_answer_rank(prompt_ids[-1])
        for start, end in pairwise([*starts, self._prompt_length]):
            self._open(start, self._chunker.mean(start, end))
        # The first boundary that decode can set lies one position behind the prompt's end, too late for a full chunk.
        full = self._chunker.close_full()
        if full is not None:
            self._open(full, self._chunker.recent)
        # The last prompt token's complexity is estimated anew once there are signals: chunks of the prompt are closed
        # before, so that what becomes of them does not depend on when signals come.
        self._close(self._prompt_length)

    def _close(self, known: int) -> None:
        """Closes, for the KV cache, the chunks that lie within the first ``known`` positions."""
        while self._closed + 1 < len(self._chunks) and self._chunks[self._closed + 1].start <= known:
            start, end = self._chunks[self._closed].start, self._chunks[self._closed + 1].start
            self._kv.close(Chunk(start, end, self._chunker.mean(start, end)))
            self._closed += 1

    def _open(self, start: int, level: float) -> _SteeredChunk:
        choice = self._choose(start, level)
        changed = bool(self._chunks) and choice != self._chunks[-1].choice
        # A window longer than the shortest chunk could not finish within it.
        window = min(self._policy.rank.crossfade, self._policy.chunker.min_length)
        chunk = _SteeredChunk(start, level, choice, window if changed else 0)
        self._chunks.append(chunk)
        return chunk

    def _choose(self, start: int, level: float) -> RankChoice:
        if self._ranks is None:
            return _NO_ADAPTER
        if isinstance(self._ranks, RankSelector):
            return self._ranks.select(level)
        return self._planned[bisect_right(self._planned, start, key=lambda chunk: chunk.start) - 1].choice

    def _decision(self, chunk: _SteeredChunk) -> ChunkDecision:
        table = self._table if self._planned and chunk.start == self._planned[-1].start else 0
        choice = chunk.choice
        return ChunkDecision(self._request_id, chunk.start, choice.rung, choice.scale, chunk.crossfade, table)

    def _add_answer_rank(self, token_id: int) -> None:
        """Takes the next token of the answer's chunk, which the shards look up in the rung table."""
        choice = self._answer_tokens.get(token_id, self._planned[-1].choice)
        self._answer_ranks.append(self._answer_ranks[-1] + choice.active_rank)

    def _mean_rank(self, chunk: _SteeredChunk, end: int) -> float:
        """Of a chunk's tokens before ``end``, those of the answer with the ranks that they took by themselves."""
        first = self._prompt_length - 1
        if not self._table or chunk.start < first:
            return chunk.choice.active_rank
        total = self._answer_ranks[end - first] - self._answer_ranks[chunk.start - first]
        return total / (end - chunk.start)

    def _chunk_report(self, chunk: _SteeredChunk, end: int, kv: KvChoice) -> ChunkReport:
        known = min(end, self._chunker.observed)
        complexity = self._chunker.mean(chunk.start, known) if known > chunk.start else chunk.level
        choice = chunk.choice
        return ChunkReport(
            chunk.start,
            end,
            choice.rung,
            self._mean_rank(chunk, end),
            choice.scale,
            chunk.crossfade,
            complexity,
            kv=kv.format,
            kv_dropped=kv.drop_percent / 100,
        )

    def _check_order(self, position: int) -> None:
        last_of_prompt = self._prompt_length - 1
        in_prompt = self._computed <= position < last_of_prompt
        in_decode = position == max(self._computed, last_of_prompt)
        if not in_prompt and not in_decode:
            raise SteeringViolation(
                f"request {self._request_id} reports signals at position {position} after {self._computed} computed "
                f"tokens of a prompt of {self._prompt_length}; positions ascend, by one from the prompt's last token on"
            )
        if position >= self._prompt_length + self._generated:
            raise SteeringViolation(
                f"request {self._request_id} reports signals at position {position} before its token was given; "
                "extend it with every generated token first"
            )

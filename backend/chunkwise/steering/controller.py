"""The steering of all live requests: what the router's loop talks to. Does no IO: updates are values to be sent."""

from __future__ import annotations

from collections.abc import Sequence

from chunkwise.config.policy import SteeringPolicy
from chunkwise.core import AdapterInfo, ChunkDecision, KvDecision, RungTable, SteeringUpdate, StepSignals
from chunkwise.steering.plans import RankPlan, make_plan
from chunkwise.steering.ranks import RankSelector
from chunkwise.steering.report import SteeringReport
from chunkwise.steering.sequence import SteeredSequence


class SteeringController:
    """Turns tokens and signals of many requests into numbered steering updates.

    The loop flushes right before it sends a step, and observes the signals of step n after step n + 1 was sent and
    before step n + 2 is. Under that contract no decision starts at a position that is computed when its update becomes
    effective, and the updates depend on the calls' arguments and order alone. Request ids are used once per controller.

    Args:
        page_size: tokens in a page of the shards' KV cache; KV decisions cover whole pages.
    """

    def __init__(self, policy: SteeringPolicy, page_size: int = 1) -> None:
        self._policy = policy
        self._plans: dict[AdapterInfo, RankPlan | RankSelector] = {}
        self._page_size = page_size
        self._sequences: dict[int, SteeredSequence] = {}
        self._paused: set[int] = set()
        self._chunks: list[ChunkDecision] = []
        self._kv: list[KvDecision] = []
        self._released: list[int] = []
        self._tables: list[RungTable] = []
        self._table_numbers: dict[int, int] = {}
        self._seq = 0

    @property
    def last_seq(self) -> int:
        """``seq`` of the newest flushed update, 0 before the first."""
        return self._seq

    def admit(self, request_id: int, prompt_ids: Sequence[int], adapter: AdapterInfo | None) -> None:
        """Plans the prompt of a new request. Without an adapter its chunks steer the KV cache alone. Beside requests
        that are compressed because memory is short, it is compressed from the start.

        Raises:
            ValueError: the id is live already, the prompt is empty, or the adapter's rungs are malformed.
            InvalidPolicy: the policy's section for the adapter was made for other weights.
        """
        if request_id in self._sequences:
            raise ValueError(f"request {request_id} is already steered; ids are used once")
        ranks = self._ranks(adapter) if adapter is not None else None
        short = any(sequence.compressed for sequence in self._sequences.values())
        sequence = SteeredSequence(
            request_id,
            prompt_ids,
            self._policy,
            ranks,
            table=self._table(ranks),
            page_size=self._page_size,
            compressed=short,
        )
        self._sequences[request_id] = sequence
        self._chunks.extend(sequence.decisions())

    def extend(self, request_id: int, token_id: int) -> None:
        """Takes the next generated token of a request. Raises ValueError if the request is not live."""
        self._sequence(request_id).extend(token_id)

    def observe(self, signals: StepSignals) -> None:
        """Takes the signals of one step. Those of requests that are not live are ignored: signals trail the last step.

        Raises:
            SteeringViolation: a live request's position does not follow the one before, or its token was never given.
        """
        for of_sequence in signals.signals:
            sequence = self._sequences.get(of_sequence.request_id)
            if sequence is None:
                continue
            decision = sequence.observe(of_sequence)
            if decision is not None and of_sequence.request_id not in self._paused:
                self._chunks.append(decision)

    def pause(self, request_id: int) -> None:
        """A request has been pre-empted: the next update releases it on the shards, and no decision of it is sent
        before `resume`. Raises ValueError if it is not live."""
        self._sequence(request_id)
        self._paused.add(request_id)
        self._forget(request_id)

    def resume(self, request_id: int) -> None:
        """A request that was paused, which the shards have been told, is about to be computed anew from its beginning:
        the next update repeats all its decisions. Raises ValueError if it is not live."""
        sequence = self._sequence(request_id)
        self._paused.remove(request_id)
        self._kv.extend(sequence.resume())
        self._chunks.extend(sequence.decisions())

    def compress_next(self) -> bool:
        """Memory is short: has the oldest request compressed that is not yet; False if all are, or none can be. To be
        called between steps, when every token generated so far has been given."""
        running = (sequence for id, sequence in self._sequences.items() if id not in self._paused)
        oldest = next((sequence for sequence in running if not sequence.compressed), None)
        if oldest is None or self._policy.kv.kind == "full":
            return False
        oldest.compress()
        return True

    def report(self, request_id: int, length: int) -> SteeringReport:
        """What steering did to the first ``length`` positions of a request. Raises ValueError if it is not live."""
        return self._sequence(request_id).report(length)

    def release(self, request_id: int) -> SteeringReport | None:
        """Forgets a request and drops its unsent decisions; the next update releases it on the shards.

        Returns its report over the tokens known to be computed, or None if it is not live.
        """
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        self._paused.discard(request_id)
        self._forget(request_id)
        return sequence.report(sequence.computed)

    def flush(self, ahead: bool = False) -> SteeringUpdate | None:
        """Everything decided since the last flush, as the next update; None if nothing was.

        Args:
            ahead: the step before the one to be sent still runs, and its tokens have not been given yet.
        """
        for request_id, sequence in self._sequences.items():
            if request_id not in self._paused:
                self._kv.extend(sequence.due_kv(ahead))
        if not (self._chunks or self._kv or self._released):
            return None
        self._seq += 1
        update = SteeringUpdate(
            self._seq, tuple(self._chunks), tuple(self._kv), tuple(self._released), tuple(self._tables)
        )
        self._chunks, self._kv, self._released, self._tables = [], [], [], []
        return update

    def _ranks(self, adapter: AdapterInfo) -> RankPlan | RankSelector:
        ranks = self._plans.get(adapter)
        if ranks is None:
            ranks = self._plans[adapter] = make_plan(self._policy, adapter) or RankSelector(self._policy.rank, adapter)
        return ranks

    def _table(self, ranks: RankPlan | RankSelector | None) -> int:
        """The number of the rung table of a plan's answer tokens, which is sent with the first request that needs it; 0
        if there are none."""
        if ranks is None or isinstance(ranks, RankSelector) or not ranks.answer_tokens:
            return 0
        number = self._table_numbers.get(id(ranks))
        if number is None:
            number = self._table_numbers[id(ranks)] = len(self._table_numbers) + 1
            rungs = {token_id: choice.rung or 0 for token_id, choice in ranks.answer_tokens.items()}
            self._tables.append(RungTable(number, rungs))
        return number

    def _forget(self, request_id: int) -> None:
        """Drops unsent decisions of a request and has the next update release it."""
        self._chunks = [decision for decision in self._chunks if decision.request_id != request_id]
        self._kv = [decision for decision in self._kv if decision.request_id != request_id]
        self._released.append(request_id)

    def _sequence(self, request_id: int) -> SteeredSequence:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise ValueError(f"request {request_id} is not steered; admit it first, do not use it after its release")
        return sequence

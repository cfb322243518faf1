"""Which positions a chunk's KV policy covers, and when it takes effect. What becomes of a chunk is `kv_policy`'s."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from chunkwise.config.policy import KvPolicy
from chunkwise.core import Chunk, KvDecision
from chunkwise.steering.kv_policy import KvChoice, kv_rule, milder


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Whole pages of one choice; ``closed`` is the end of the chunk that decided it."""

    start: int
    end: int
    choice: KvChoice
    closed: int


class KvSchedule:
    """KV decisions of one request, each with the position before whose computation it takes effect.

    That position follows from the request alone. In the prompt it is the first multiple of ``block_tokens`` at which
    the chunk has left the recent window; where the prompt has no such multiple, it is the answer's first position or,
    later, the one at which the chunk leaves the window.

    Pages are the unit: one that several chunks share becomes the mildest of what they choose, together with the last of
    them. The first ``sink_tokens`` positions (attention sinks) choose to stay full.

    With ``when`` "pressure", unless ``compressed``, nothing is decided before `compress`, and nothing takes effect
    before its position.

    Attributes:
        made: the decisions given out so far, in order.
    """

    def __init__(
        self, request_id: int, prompt_length: int, policy: KvPolicy, page_size: int, compressed: bool = False
    ) -> None:
        self._request_id = request_id
        self._prompt_length = prompt_length
        self._policy = policy
        self._page_size = page_size
        self._rule = kv_rule(policy)
        self._from = 0 if compressed or policy.when == "always" else None
        # What the chunks so far choose for a page that is not theirs alone.
        self._shared = KvChoice()
        self._waiting: deque[_Stretch] = deque()
        self._effects: dict[int, tuple[int, KvChoice]] = {}
        self.made: list[KvDecision] = []

    @property
    def compressed(self) -> bool:
        """Whether chunks are decided on as they leave the window."""
        return self._from is not None

    def compress(self, position: int) -> None:
        """Memory is short: from now on chunks are decided on, none of them to take effect before ``position``."""
        if self._from is None:
            self._from = position

    def close(self, chunk: Chunk) -> None:
        """Takes a chunk whose complexity is known; chunks come in ascending order, without gaps."""
        sinks = min(max(self._policy.sink_tokens, chunk.start), chunk.end)
        self._cover(chunk.start, sinks, KvChoice(), chunk.end)
        self._cover(sinks, chunk.end, self._rule.choose(chunk.complexity), chunk.end)

    def advance(self, position: int) -> list[KvDecision]:
        """The decisions that take effect at ``position`` or before it, each given once."""
        due: list[KvDecision] = []
        while self._from is not None and self._waiting:
            stretch, choice = self._waiting[0], self._waiting[0].choice
            effective = max(self._effective(stretch.closed), self._from)
            if effective > position:
                break
            self._waiting.popleft()
            self._effects[stretch.closed] = effective, choice
            due.append(
                KvDecision(
                    self._request_id,
                    stretch.start,
                    stretch.end,
                    choice.format,
                    choice.drop_percent,
                    choice.scorer,
                    effective,
                )
            )
        self.made += due
        return due

    def effect(self, end: int, computed: int) -> KvChoice:
        """What has become of the last whole pages of the chunk that ends at ``end`` once ``computed`` positions are
        computed."""
        effective, choice = self._effects.get(end, (computed, KvChoice()))
        return choice if effective < computed else KvChoice()

    def _cover(self, start: int, end: int, choice: KvChoice, closed: int) -> None:
        """Adds positions that follow the last ones and make the same choice."""
        if start == end:
            return
        page = self._page_size
        first, last = start // page * page, end // page * page
        shared = milder(self._shared, choice) if first < start else choice
        if first < last and shared != choice:
            self._wait(first, first + page, shared, closed)
            first, shared = first + page, choice
        self._wait(first, last, choice, closed)
        self._shared = shared if first == last else choice

    def _wait(self, start: int, end: int, choice: KvChoice, closed: int) -> None:
        if start < end and choice.changes:
            self._waiting.append(_Stretch(start, end, choice, closed))

    def _effective(self, end: int) -> int:
        # What an answer's chunk becomes is known one position behind its end, so it takes effect there at the earliest.
        left = end + max(self._policy.protected_tokens, 1)
        block = self._policy.block_tokens
        in_prompt = -(-left // block) * block
        return in_prompt if in_prompt <= self._prompt_length else max(left, self._prompt_length)

"""When the KV policy of a chunk takes effect. Knows positions; what becomes of a chunk is `kv_policy`'s."""

from __future__ import annotations

from collections import deque

from chunkwise.config.policy import KvPolicy
from chunkwise.core import Chunk, KvDecision
from chunkwise.steering.kv_policy import KvChoice, kv_rule


class KvSchedule:
    """KV decisions of one request, each with the position before whose computation it takes effect.

    That position follows from the request alone. In the prompt it is the first multiple of ``block_tokens`` at which
    the chunk has left the recent window; where the prompt has no such multiple, it is the answer's first position or,
    later, the one at which the chunk leaves the window. The first ``sink_tokens`` positions (attention sinks) are cut
    off.

    With ``when`` "pressure", unless ``compressed``, nothing is decided before `compress`, and nothing takes effect
    before its position.

    Attributes:
        made: the decisions given out so far, in order.
    """

    def __init__(self, request_id: int, prompt_length: int, policy: KvPolicy, compressed: bool = False) -> None:
        self._request_id = request_id
        self._prompt_length = prompt_length
        self._policy = policy
        self._rule = kv_rule(policy)
        self._from = 0 if compressed or policy.when == "always" else None
        self._waiting: deque[tuple[int, int, KvChoice]] = deque()
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
        """Takes a chunk whose complexity is known; chunks come in ascending order."""
        start, choice = max(chunk.start, self._policy.sink_tokens), self._rule.choose(chunk.complexity)
        if choice.changes and start < chunk.end:
            self._waiting.append((start, chunk.end, choice))

    def advance(self, position: int) -> list[KvDecision]:
        """The decisions that take effect at ``position`` or before it, each given once."""
        due: list[KvDecision] = []
        while self._from is not None and self._waiting:
            start, end, choice = self._waiting[0]
            effective = max(self._effective(end), self._from)
            if effective > position:
                break
            self._waiting.popleft()
            due.append(
                KvDecision(self._request_id, start, end, choice.format, choice.drop_percent, choice.scorer, effective)
            )
        self.made += due
        return due

    def _effective(self, end: int) -> int:
        # What an answer's chunk becomes is known one position behind its end, so it takes effect there at the earliest.
        left = end + max(self._policy.protected_tokens, 1)
        block = self._policy.block_tokens
        in_prompt = -(-left // block) * block
        return in_prompt if in_prompt <= self._prompt_length else max(left, self._prompt_length)

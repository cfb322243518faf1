"""Which closed chunks are stored in a smaller format, and from when on. Knows positions and complexities, not pages."""

from __future__ import annotations

from collections import deque

from chunkwise.config.policy import KvPolicy
from chunkwise.core import Chunk, KvDecision, KvFormat


class KvSchedule:
    """KV decisions of one request, held back until their chunk has left the recent window.

    A chunk of complexity below ``easy_below`` takes ``easy_format``; any other stays full, which needs no decision. The
    first ``sink_tokens`` positions (attention sinks) are cut off, and a chunk waits until the last ``recent_tokens``
    computed tokens all lie behind its end.
    """

    def __init__(self, request_id: int, policy: KvPolicy) -> None:
        self._request_id = request_id
        self._policy = policy
        self._waiting: deque[KvDecision] = deque()

    def close(self, chunk: Chunk) -> None:
        """Decides on a chunk all of whose tokens are computed; chunks come in ascending order."""
        start = max(chunk.start, self._policy.sink_tokens)
        easy = chunk.complexity < self._policy.easy_below
        if self._policy.easy_format == "int8" and easy and start < chunk.end:
            self._waiting.append(KvDecision(self._request_id, start, chunk.end, KvFormat.INT8))

    def advance(self, computed: int) -> list[KvDecision]:
        """The decisions that are due now that the first ``computed`` positions are computed, each given once."""
        due: list[KvDecision] = []
        while self._waiting and self._waiting[0].end + self._policy.recent_tokens <= computed:
            due.append(self._waiting.popleft())
        return due

"""Steering decisions between their arrival and the step that may see them.

`receive` is called by the stream, whenever an update arrives; `apply` by the engine, right before a step, with the
number of the last update that the step may see. So what a step computes never depends on when an update arrived.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from chunkwise.core import ChunkDecision, GenerationFailed, KvDecision, SteeringUpdate, SteeringViolation


@dataclass(slots=True)
class RequestDecisions:
    """All chunks decided for one request, ascending by start, and the KV decisions not yet executed."""

    chunks: list[ChunkDecision] = field(default_factory=list)
    kv: list[KvDecision] = field(default_factory=list)


class DecisionTable:
    """Decisions by request id. Thread-safe.

    Args:
        timeout_seconds: how long `apply` waits for an update that a step names but that has not arrived.
    """

    def __init__(self, timeout_seconds: float = 30.0) -> None:
        self._timeout = timeout_seconds
        self._arrived = threading.Condition()
        self._pending: deque[SteeringUpdate] = deque()
        self._received = 0
        self._applied = 0
        self._requests: dict[int, RequestDecisions] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def start_session(self) -> None:
        """A new stream: updates count from 1 again, and what an earlier one left behind is forgotten."""
        with self._arrived:
            self._pending.clear()
            self._requests.clear()
            self._received = self._applied = 0
            self._arrived.notify_all()

    def receive(self, update: SteeringUpdate) -> None:
        """Stores an update. Raises SteeringViolation unless it is the next in number."""
        with self._arrived:
            if update.seq != self._received + 1:
                raise SteeringViolation(
                    f"steering update {update.seq} arrived after {self._received}; number updates without gaps"
                )
            self._received = update.seq
            self._pending.append(update)
            self._arrived.notify_all()

    def apply(self, upto: int) -> tuple[ChunkDecision, ...]:
        """Makes every update numbered at most ``upto`` effective, waiting for those still under way, and none beyond.

        Returns the chunk decisions that became effective.

        Raises:
            GenerationFailed: an update did not arrive in time.
        """
        applied: list[ChunkDecision] = []
        with self._arrived:
            deadline = time.monotonic() + self._timeout
            while self._received < upto:
                if not self._arrived.wait(deadline - time.monotonic()):
                    raise GenerationFailed(
                        f"steering update {upto} did not arrive within {self._timeout:g} s (last: {self._received}); "
                        "is the Steer stream of this shard open?"
                    )
            while self._pending and self._pending[0].seq <= upto:
                update = self._pending.popleft()
                self._applied = update.seq
                applied.extend(update.chunks)
                self._apply(update)
        return tuple(applied)

    def _apply(self, update: SteeringUpdate) -> None:
        for chunk in update.chunks:
            self._requests.setdefault(chunk.request_id, RequestDecisions()).chunks.append(chunk)
        for kv in update.kv:
            self._requests.setdefault(kv.request_id, RequestDecisions()).kv.append(kv)
        for request_id in update.released:
            self._requests.pop(request_id, None)

    def chunks(self, request_id: int) -> Sequence[ChunkDecision]:
        """Effective chunks of a request, ascending; empty: full rank throughout."""
        entry = self._requests.get(request_id)
        return entry.chunks if entry else ()

    def take_kv(self, request_id: int) -> Sequence[KvDecision]:
        """KV decisions of a request that have become effective since the last call."""
        entry = self._requests.get(request_id)
        if entry is None or not entry.kv:
            return ()
        taken, entry.kv = entry.kv, []
        return taken

    def forget(self, request_id: int) -> None:
        """Drops what is stored for a request that has ended."""
        with self._arrived:
            self._requests.pop(request_id, None)

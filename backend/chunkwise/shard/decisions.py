"""Steering decisions between their arrival and the step that may see them.

`receive` is called by the stream, whenever an update arrives; `apply` by the engine, right before a step, with the
number of the last update that the step may see. So what a step computes never depends on when an update arrived. A live
sequence takes its decisions over and keeps them; what stays here belongs to requests that have not come yet.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from chunkwise.core import ChunkDecision, GenerationFailed, KvDecision, RungTable, SteeringUpdate, SteeringViolation


@dataclass(frozen=True, slots=True)
class SteeringSession:
    """One Steer stream's right to send updates; void as soon as another session starts."""

    number: int


@dataclass(slots=True)
class _Waiting:
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
        self._session = SteeringSession(0)
        self._requests: dict[int, _Waiting] = {}
        self._tables: dict[int, RungTable] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def start_session(self) -> SteeringSession:
        """A new stream: updates count from 1 again, and what an earlier one sent ahead is forgotten. Live sequences
        keep the decisions they have taken."""
        with self._arrived:
            self._pending.clear()
            self._requests.clear()
            self._tables.clear()
            self._received = 0
            self._session = SteeringSession(self._session.number + 1)
            return self._session

    def receive(self, session: SteeringSession, update: SteeringUpdate) -> None:
        """Stores an update. Raises SteeringViolation unless it is the next in number of the current session."""
        with self._arrived:
            if session != self._session:
                raise SteeringViolation("another Steer stream has been opened since; only the latest may send updates")
            if update.seq != self._received + 1:
                raise SteeringViolation(
                    f"steering update {update.seq} arrived after {self._received}; number updates without gaps"
                )
            self._received = update.seq
            self._pending.append(update)
            self._arrived.notify_all()

    def apply(self, upto: int) -> None:
        """Makes every update numbered at most ``upto`` effective, waiting for those still under way, and none beyond.

        Raises:
            GenerationFailed: an update did not arrive in time.
        """
        with self._arrived:
            deadline = time.monotonic() + self._timeout
            while self._received < upto:
                if not self._arrived.wait(deadline - time.monotonic()):
                    raise GenerationFailed(
                        f"steering update {upto} did not arrive within {self._timeout:g} s (last: {self._received}); "
                        "is the Steer stream of this shard open?"
                    )
            while self._pending and self._pending[0].seq <= upto:
                self._apply(self._pending.popleft())

    def _apply(self, update: SteeringUpdate) -> None:
        self._tables.update((table.id, table) for table in update.tables)
        for chunk in update.chunks:
            self._requests.setdefault(chunk.request_id, _Waiting()).chunks.append(chunk)
        for kv in update.kv:
            self._requests.setdefault(kv.request_id, _Waiting()).kv.append(kv)
        for request_id in update.released:
            self._requests.pop(request_id, None)

    def take_chunks(self, request_id: int) -> Sequence[ChunkDecision]:
        """Chunk decisions of a request that have become effective since the last call."""
        waiting = self._requests.get(request_id)
        if waiting is None or not waiting.chunks:
            return ()
        taken, waiting.chunks = waiting.chunks, []
        return taken

    def table(self, number: int) -> RungTable:
        """A table that has become effective in this session. Raises SteeringViolation for any other number."""
        try:
            return self._tables[number]
        except KeyError:
            raise SteeringViolation(f"a chunk names rung table {number}, which was not sent; send it before") from None

    def take_kv(self, request_id: int) -> Sequence[KvDecision]:
        """KV decisions of a request that have become effective since the last call."""
        waiting = self._requests.get(request_id)
        if waiting is None or not waiting.kv:
            return ()
        taken, waiting.kv = waiting.kv, []
        return taken

    def forget(self, request_id: int) -> None:
        """Drops what is stored for a request that has ended."""
        with self._arrived:
            self._requests.pop(request_id, None)

"""One thread that runs everything that touches the model, one call after another, in the same order on every rank.

Calls reach the ranks over separate connections, so two that overlap (TGI's liveness Prefill beside a Decode) may arrive
in different orders. Ranks that ran them so would mix the halves of two steps without noticing; so rank 0's order is
made known before each call, and the others wait for the call it names.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from queue import SimpleQueue
from typing import Any, TypeVar

from google.protobuf.message import Message

from chunkwise.core import GenerationFailed
from chunkwise.model.parallel import Group

R = TypeVar("R")


def call_key(method: str, request: Message) -> int:
    """A number that is the same for the same call on every rank."""
    digest = blake2b(method.encode() + request.SerializeToString(deterministic=True), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


class ShuttingDown(GenerationFailed):
    """The shard takes no calls any more."""


class _Call:
    """A call that waits for its turn, made on an event loop's thread."""

    def __init__(self, key: int, act: Callable[[], Any]) -> None:
        self.key = key
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._act = act
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._act()
        except BaseException as error:
            self._error = error

    def fail(self, error: BaseException) -> None:
        self._error = error

    def announce(self) -> None:
        """Settles the outcome; from any thread."""
        # The loop may be closed by now, and nobody there to hear it.
        with suppress(RuntimeError):
            self.outcome.get_loop().call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        if self.outcome.done():
            return
        if self._error is not None:
            self.outcome.set_exception(self._error)
        else:
            self.outcome.set_result(self._result)


class Lane:
    """Args:
    group: the ranks that must agree on the order.
    timeout_seconds: how long a rank waits for a call that rank 0 is running.
    """

    def __init__(self, group: Group, timeout_seconds: float = 60.0) -> None:
        self._group = group
        self._timeout = timeout_seconds
        self._arrived = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._closed = False
        self._ended: SimpleQueue[_Call] = SimpleQueue()
        threading.Thread(target=self._work, name="engine", daemon=True).start()
        threading.Thread(target=self._announce, name="announcer", daemon=True).start()

    async def run(self, key: int, act: Callable[[], R]) -> R:
        """The result of ``act``, once its turn has come. It runs even if the caller stops waiting: the other ranks run
        it too.

        Raises:
            ShuttingDown: the lane has been closed.
            GenerationFailed: rank 0 ran a call that never reached this rank.
        """
        return await asyncio.shield(self.submit(key, act))

    def submit(self, key: int, act: Callable[[], R]) -> asyncio.Future[R]:
        """`run` without waiting: calls get their turns in the order in which they are submitted. Raises ShuttingDown
        after `close`."""
        if self._closed:
            raise ShuttingDown("the shard is shutting down")
        call = _Call(key, act)
        with self._arrived:
            self._waiting.append(call)
            self._arrived.notify_all()
        return call.outcome

    def close(self) -> None:
        """Refuses calls from now on; those that wait have their turns."""
        self._closed = True

    def key(self, method: str, request: Message) -> int:
        """A call's name among the ranks; a rank that is alone needs none."""
        return call_key(method, request) if self._group.world_size > 1 else 0

    def _work(self) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._waiting)
                oldest = self._waiting[0]
            try:
                call = self._take(self._group.first(oldest.key))
            except Exception as error:
                call = self._take(oldest.key)
                call.fail(error)
            else:
                call.run()
            self._ended.put(call)

    def _announce(self) -> None:
        """To wake an event loop gives the interpreter lock away, and the loop keeps it for as long as it has to do with
        the result. So the engine's thread, which has the next step to begin, leaves that to this one."""
        while True:
            self._ended.get().announce()

    def _take(self, key: int) -> _Call:
        def find() -> _Call | None:
            return next((call for call in self._waiting if call.key == key), None)

        with self._arrived:
            call = self._arrived.wait_for(find, self._timeout)
            if call is None:
                raise GenerationFailed(
                    f"rank 0 runs a call that did not reach rank {self._group.rank} within {self._timeout:g} s; "
                    "send every call to all shards"
                )
            self._waiting.remove(call)
            return call

"""Threads that run one kernel together, and the barrier inside it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkwise.model.kernels.compile import kernel
from chunkwise.model.kernels.tiles import atomic_add, atomic_load, yield_core

_Call = tuple[Callable[..., Any], tuple[Any, ...]]

_SPINS = 20_000
"""Looks at the barrier before a thread offers its core to others: about the time of one phase."""


@kernel
def meet(sync, team):
    """Waits until all threads of the team are here; what they wrote before is seen after."""
    if team == 1:
        return
    target = (atomic_add(sync, 1) // team + 1) * team
    spins = 0
    while atomic_load(sync) < target:
        spins += 1
        if spins > _SPINS:
            yield_core()


class Team:
    """``threads`` threads, the caller's one of them, until the team is dropped. Kernels that a team runs end at a
    barrier.

    Attributes:
        sync: address of the barrier's counter. It belongs to the threads: one may look at it once more when the run
            has ended for the caller.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        # A cache line of its own in the middle: the threads spin on it.
        counters = np.zeros(24, dtype=np.int64)
        self.sync = counters.ctypes.data + 64
        self._calls: list[SimpleQueue[_Call | None]] = [SimpleQueue() for _ in range(1, threads)]
        for me, calls in enumerate(self._calls, start=1):
            arguments = (calls, me, threads, counters)
            threading.Thread(target=_work, args=arguments, name=f"kernel-{me}", daemon=True).start()
        weakref.finalize(self, _dismiss, self._calls)

    def run(self, call: Callable[..., Any], *args: Any) -> None:
        """``call(*args, me, threads)`` on every thread at once."""
        for calls in self._calls:
            calls.put((call, args))
        call(*args, 0, self.threads)


def _work(calls: SimpleQueue[_Call | None], me: int, threads: int, counters: NDArray[np.int64]) -> None:
    while (work := calls.get()) is not None:
        call, args = work
        call(*args, me, threads)
        # Not kept until the next call: freed when the process ends, a view of a tensor would abort it.
        del work, call, args


def _dismiss(queues: list[SimpleQueue[_Call | None]]) -> None:
    for calls in queues:
        calls.put(None)

"""The barrier holds every thread until the last is there, and a team's run ends when all its threads are done."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import threading
import time
import weakref

import numpy as np
import pytest
from numba import carray

from chunkwise.model.kernels.compile import entry
from chunkwise.model.kernels.team import Team, meet
from chunkwise.model.kernels.tiles import as_pointer, atomic_add

ROUNDS = 100


@entry
def rounds_of(sync, place, counter, errors, rounds, me, team):
    """Each round a thread writes its own number and then reads all the others'."""
    places = carray(as_pointer(place), team * 8, np.int64)
    for number in range(1, rounds + 1):
        # Threads do not come at the same time.
        for i in range((me * 7919 + number * 104729) % 2000):
            places[8 * me + 1] += i
        places[8 * me] = number
        atomic_add(counter, 1)
        meet(sync, team)
        for other in range(team):
            if places[8 * other] != number:
                atomic_add(errors, 1)
        meet(sync, team)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_nobody_passes_the_barrier_before_the_last_one_came(threads: int) -> None:
    team = Team(threads)
    counter, errors, place = (np.zeros(8 * threads, dtype=np.int64) for _ in range(3))
    addresses = [team.sync, *(array.ctypes.data for array in (place, counter, errors))]
    for runs in range(1, 6):
        team.run(rounds_of, *addresses, ROUNDS // 5)
        # Read as soon as run() is back: it must not come back early.
        assert counter[0] == runs * ROUNDS // 5 * threads
    assert errors[0] == 0


@entry
def mark(sync, place, value, me, team):
    carray(as_pointer(place), team, np.int64)[me] = value + me
    meet(sync, team)


def test_every_thread_gets_the_arguments_of_every_run() -> None:
    team, place = Team(3), np.zeros(3, dtype=np.int64)
    for value in range(0, 300, 10):
        team.run(mark, team.sync, place.ctypes.data, value)
        assert place.tolist() == [value, value + 1, value + 2]


@entry
def fill(sync, values, value, me, team):
    for i in range(me, len(values), team):
        values[i] = value
    meet(sync, team)


def test_nothing_of_a_run_is_kept() -> None:
    team, values = Team(3), np.zeros(64)
    team.run(fill, team.sync, values, 2.0)
    assert (values == 2.0).all()
    kept = weakref.ref(values)
    del values
    deadline = time.monotonic() + 60
    while kept() is not None:
        assert time.monotonic() < deadline, "a thread of the team holds what the run was given"
        time.sleep(0.001)


def test_threads_end_when_their_team_is_dropped() -> None:
    before = set(threading.enumerate())
    team = Team(4)
    place = np.zeros(4, dtype=np.int64)
    team.run(mark, team.sync, place.ctypes.data, 1)
    started = set(threading.enumerate()) - before
    assert len(started) == 3
    del team
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()

"""Calls run one at a time, and on every rank in rank 0's order."""

from __future__ import annotations

import asyncio
import queue
import time

import pytest

from chunkwise.core import GenerationFailed
from chunkwise.model.parallel import SingleProcess
from chunkwise.pb import generate_pb2 as pb
from chunkwise.shard.lane import Lane, ShuttingDown, call_key


class Rank(SingleProcess):
    """A rank of a pair in one process: rank 0 tells the other its choices through a queue."""

    def __init__(self, rank: int, wire: queue.Queue[int]) -> None:
        self.rank = rank
        self.world_size = 2
        self._wire = wire

    def first(self, value: int) -> int:
        if self.rank == 0:
            self._wire.put(value)
            return value
        return self._wire.get(timeout=10)


async def test_ranks_that_get_calls_in_different_orders_run_them_in_one() -> None:
    wire: queue.Queue[int] = queue.Queue()
    lanes = [Lane(Rank(rank, wire)) for rank in (0, 1)]
    ran: list[list[int]] = [[], []]

    def act(rank: int, key: int) -> int:
        time.sleep(0.01)
        ran[rank].append(key)
        return key

    orders = [[3, 1, 2, 1], [1, 2, 1, 3]]
    calls = [lanes[rank].run(key, lambda r=rank, k=key: act(r, k)) for rank in (0, 1) for key in orders[rank]]
    assert await asyncio.gather(*calls) == orders[0] + orders[1]
    assert ran[0] == ran[1] == orders[0]


async def test_a_call_that_only_rank_0_got_fails_the_other_rank_with_the_reason() -> None:
    wire: queue.Queue[int] = queue.Queue()
    wire.put(7)
    lane = Lane(Rank(1, wire), timeout_seconds=0.05)
    with pytest.raises(GenerationFailed, match="send every call to all shards"):
        await lane.run(8, lambda: None)


async def test_errors_reach_the_caller_and_a_caller_that_leaves_does_not_stop_the_call() -> None:
    lane = Lane(SingleProcess())

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await lane.run(1, fail)
    done: list[int] = []

    def slow() -> None:
        time.sleep(0.05)
        done.append(1)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(lane.run(2, slow), 0.01)
    await lane.run(3, lambda: None)
    assert done == [1]


async def test_a_lane_that_is_closed_ends_what_it_has_and_takes_nothing_new() -> None:
    lane = Lane(SingleProcess())
    running = lane.submit(1, lambda: time.sleep(0.02))
    waiting = lane.submit(2, lambda: 2)
    lane.close()
    with pytest.raises(ShuttingDown):
        await lane.run(3, lambda: 3)
    await running
    assert await waiting == 2


def test_keys_tell_calls_apart() -> None:
    one, two = pb.ClearCacheRequest(id=1), pb.ClearCacheRequest(id=2)
    assert call_key("ClearCache", one) == call_key("ClearCache", pb.ClearCacheRequest(id=1))
    assert len({call_key("ClearCache", one), call_key("ClearCache", two), call_key("Decode", one)}) == 3

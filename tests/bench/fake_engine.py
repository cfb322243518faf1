"""A runner with no model: run as a program, it answers the bench's protocol as told by its first argument."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from chunkwise.bench.runners.protocol import (
    Json,
    RunResult,
    StartOrder,
    StreamOrder,
    StreamResult,
    answer,
    take_stdout,
)


class Engine:
    """Token i of a stream is the prompt's length plus i and comes after i + 1 milliseconds. ``mood`` "short" loses the
    last token of every stream, "refuse" raises in runs, "die" ends the process in runs."""

    def __init__(self, mood: str) -> None:
        self._mood = mood

    def start(self, order: StartOrder) -> Json:
        print("noise on stdout must not disturb the protocol")
        return {"versions": {"fake": "1"}, "settings": {"threads": order.threads}, "start_seconds": 0.0}

    def run(self, streams: Sequence[StreamOrder]) -> RunResult:
        if self._mood == "die":
            sys.stderr.write("out of cheese\n")
            sys.stderr.flush()
            os._exit(3)
        if self._mood == "refuse":
            raise ValueError("no such adapter")
        results = []
        for stream in streams:
            tokens = stream.new_tokens - (self._mood == "short")
            times = [1.0 + index for index in range(tokens)]
            results.append(StreamResult(times, [len(stream.ids) + index for index in range(tokens)], stream.start_ms))
        return RunResult(results, [list(range(len(streams)))], {"asked": float(len(streams))})

    def pids(self) -> list[int]:
        return [os.getpid()]

    def stop(self) -> None:
        print("stopped", file=sys.stderr)


if __name__ == "__main__":
    replies = take_stdout()
    answer(Engine(sys.argv[1]), sys.stdin, replies)

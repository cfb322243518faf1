"""What the bench and an engine's process say to each other: a JSON object a line, requests on stdin, replies on stdout.

Requests are ``{"do": "start", …}`` once, then ``{"do": "run", "streams": […]}`` any number of times; end of input ends
the process. A reply with ``error`` says that the request failed. Standard library only: a rival's own Python runs this.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StartOrder:
    """How to load the model.

    ``adapters`` maps names to PEFT directories, or to GGUF files for llama.cpp, where ``model`` is a GGUF file too.
    ``streams`` is the largest number of streams at once and ``tokens`` the longest stream, prompt and answer, of any
    run to come. ``options`` are flags of the engine's own.
    """

    model: str
    adapters: dict[str, str]
    threads: int
    dtype: str
    streams: int
    tokens: int
    options: list[str]


@dataclass(frozen=True, slots=True)
class StreamOrder:
    """An answer to generate greedily: ``ids`` are the prompt's tokens and ``text`` the same prompt as text; ``adapter``
    is a name from the start order (None: the base model); ``start_ms`` when it is asked for, after the run's start."""

    text: str
    ids: list[int]
    adapter: str | None
    new_tokens: int
    start_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class StreamResult:
    """What came of one stream: the moment of every token, in milliseconds after the stream was asked for, and its id.
    ``mean_rank`` is the adapter rank spent per token of the answer, where the engine says."""

    times_ms: list[float]
    ids: list[int]
    start_ms: float = 0.0
    mean_rank: float | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came of one run. ``groups`` are the streams that decoded together, by index: an engine that cannot mix
    adapters runs its groups one after another. ``server`` holds figures that the engine itself reports."""

    streams: list[StreamResult]
    groups: list[list[int]]
    server: dict[str, float]


class Runner(Protocol):
    """One engine in its process."""

    def start(self, order: StartOrder) -> Json:
        """Loads the model and says ``versions`` and ``settings``; called once, before all runs."""

    def run(self, streams: Sequence[StreamOrder]) -> RunResult:
        """Generates all streams, each for exactly its number of new tokens whatever the end-of-sequence token says."""

    def pids(self) -> list[int]:
        """The processes whose memory is the engine's."""

    def stop(self) -> None:
        """Ends what `start` began."""


def run_result(reply: Json) -> RunResult:
    """The result that a run's reply carries."""
    return RunResult([StreamResult(**stream) for stream in reply["streams"]], reply["groups"], reply["server"])


def answer(runner: Runner, requests: Iterable[str], replies: TextIO) -> None:
    """Serves requests until they end. A request that fails is answered with ``error``; the next one is served."""
    try:
        for line in requests:
            try:
                reply = _reply(runner, json.loads(line))
            except Exception as error:  # whatever a rival raises belongs in the report, not in a dead pipe
                traceback.print_exc(file=sys.stderr)
                reply = {"error": f"{type(error).__name__}: {error}"}
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
    finally:
        runner.stop()


def _reply(runner: Runner, request: Json) -> Json:
    kind = request.pop("do")
    if kind == "start":
        return runner.start(StartOrder(**request)) | {"pids": runner.pids()}
    result = runner.run([StreamOrder(**stream) for stream in request["streams"]])
    return asdict(result) | {"pids": runner.pids()}


def take_stdout() -> TextIO:
    """The real standard output, for replies; what the engine itself prints goes to standard error from here on."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def process_tree(pid: int) -> list[int]:
    """``pid`` and all its descendants that live."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except FileNotFoundError:
        return []
    return [pid, *(deeper for child in children for deeper in process_tree(int(child)))]

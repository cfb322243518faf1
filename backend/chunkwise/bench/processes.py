"""Engines as processes that speak `runners.protocol`: started, asked, frozen while another engine is measured, ended.

A frozen process is stopped (SIGSTOP) with all its children, so that an idle engine's spinning threads take no core.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from chunkwise.bench.load import Load, read_load
from chunkwise.bench.runners import protocol
from chunkwise.bench.runners.protocol import Json, RunResult, StartOrder, StreamOrder, process_tree
from chunkwise.core import ChunkwiseError

_START = Path(__file__).parent / "runners" / "start.py"
_LOG_LINES = 15
_END_SECONDS = 120


class EngineFailed(ChunkwiseError):
    """An engine could not start or answer; the message ends with its last words."""


class EngineProcess:
    """One engine. It is frozen except inside `start` and `run`.

    Args:
        name: what messages call it.
        command: what to run; its first word is a program.
        log: file that takes its standard error.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.pids: list[int] = []
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # Nobody waits for its answer any more.
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
        self.close()

    def start(self, order: StartOrder) -> Json:
        """Loads the model; returns versions and settings. Raises EngineFailed."""
        return self._ask({"do": "start", **asdict(order)})

    def run(self, streams: Sequence[StreamOrder]) -> RunResult:
        """Generates ``streams``. Raises EngineFailed, also when a stream did not get all its tokens."""
        result = protocol.run_result(self._ask({"do": "run", "streams": [asdict(stream) for stream in streams]}))
        got = [len(stream.ids) for stream in result.streams]
        wanted = [stream.new_tokens for stream in streams]
        if got != wanted:
            raise EngineFailed(f"{self.name} generated {got} tokens where {wanted} were asked for")
        return result

    def peak_bytes(self) -> dict[str, int]:
        """Largest resident set so far of each of the engine's processes, by command name and id."""
        return {f"{_command(pid)} {pid}": _peak_resident_bytes(pid) for pid in self.pids}

    def load(self) -> Load:
        """The machine's load, with this engine and its client as the own processes."""
        return read_load(process_tree(self._process.pid))

    def close(self) -> None:
        """Ends the process and its children."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        # It may have ended before it had read everything.
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: Json) -> Json:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineFailed(f"{self.name} ended; its last words in {self._log}:\n{self._last_words()}")
        self._signal(signal.SIGSTOP)
        reply: Json = json.loads(line)
        if "error" in reply:
            raise EngineFailed(f"{self.name}: {reply['error']}")
        self.pids = reply["pids"]
        return reply

    def _signal(self, signum: signal.Signals) -> None:
        """Parents are stopped before their children and woken after them."""
        pids = process_tree(self._process.pid)
        for pid in pids if signum == signal.SIGSTOP else reversed(pids):
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                continue

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])


def runner_command(python: str, runner: str, environment: Mapping[str, str]) -> list[str]:
    """The command that runs the module ``runner`` of `chunkwise.bench.runners` in the interpreter ``python``."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    # -P keeps the runners' folder off the path, where peft.py would hide the package of that name.
    return ["env", *variables, python, "-P", str(_START), runner]


def _peak_resident_bytes(pid: int) -> int:
    for line in _status(pid):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _command(pid: int) -> str:
    """What a process is: chunkwise's command word where it is one of ours, else the program's name."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "gone"
    if "chunkwise" in words:
        return words[words.index("chunkwise") + 1]
    return Path(words[0]).name


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return []

"""Engines as processes, with an engine that has no model."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chunkwise.bench.load import others_share, read_load
from chunkwise.bench.processes import EngineFailed, EngineProcess, runner_command
from chunkwise.bench.runners.protocol import StartOrder, StreamOrder

ORDER = StartOrder("model", {}, 2, "float32", 1, 8, [])
STREAMS = [StreamOrder("abc", [1, 2, 3], None, 4), StreamOrder("a", [1], "a0", 2, start_ms=5.0)]


@contextmanager
def fake(tmp_path: Path, mood: str = "fine") -> Iterator[EngineProcess]:
    command = [sys.executable, str(Path(__file__).with_name("fake_engine.py")), mood]
    with EngineProcess("fake", command, tmp_path / "log") as process:
        yield process


def state(pid: int) -> str:
    """The kernel's letter for a process's state; T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_results_come_back_as_the_engine_gave_them(tmp_path: Path) -> None:
    with fake(tmp_path) as process:
        assert process.start(ORDER)["settings"] == {"threads": 2}
        result = process.run(STREAMS)
    assert [s.ids for s in result.streams] == [[3, 4, 5, 6], [1, 2]]
    assert [s.start_ms for s in result.streams] == [0.0, 5.0]
    assert result.groups == [[0, 1]]
    assert result.server == {"asked": 2.0}
    log = (tmp_path / "log").read_text()
    assert "noise on stdout" in log
    assert "stopped" in log


def test_an_engine_is_frozen_between_requests(tmp_path: Path) -> None:
    with fake(tmp_path) as process:
        for ask in (lambda: process.start(ORDER), lambda: process.run(STREAMS)):
            ask()
            (pid,) = process.pids
            deadline = time.monotonic() + 5
            while state(pid) != "T" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert state(pid) == "T"
        (peak,) = process.peak_bytes().values()
        assert peak > 1_000_000
    assert not Path(f"/proc/{pid}").exists()


def test_a_refusal_names_the_engine_and_its_reason_and_leaves_it_running(tmp_path: Path) -> None:
    with fake(tmp_path, "refuse") as process:
        process.start(ORDER)
        for _ in range(2):
            with pytest.raises(EngineFailed, match="fake: ValueError: no such adapter"):
                process.run(STREAMS)


def test_an_engine_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with fake(tmp_path, "die") as process:
        process.start(ORDER)
        for _ in range(2):
            with pytest.raises(EngineFailed, match="out of cheese"):
                process.run(STREAMS)


def test_answers_that_are_too_short_do_not_count(tmp_path: Path) -> None:
    with fake(tmp_path, "short") as process:
        process.start(ORDER)
        with pytest.raises(EngineFailed, match=r"\[3, 1\] tokens where \[4, 2\]"):
            process.run(STREAMS)


def test_a_runner_starts_in_a_python_that_has_no_chunkwise(tmp_path: Path) -> None:
    """Isolated and without site-packages, the interpreter is as bare as a rival's environment. The runner named here
    does not exist, so the error shows that its package, and nothing else, was made importable."""
    command = runner_command(sys.executable, "nothing", {"SOME": "thing"})
    assert command[:2] == ["env", "SOME=thing"]
    bare = [*command[:3], "-S", "-I", *command[4:]]
    done = subprocess.run(bare, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert "No module named 'chunkwise.bench.runners.nothing'" in done.stderr


def test_others_are_those_who_are_not_the_engine(tmp_path: Path) -> None:
    """A child that counts is one of the others, or, when it is the engine, nobody."""
    code = "while True: pass"
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        before, before_own = read_load([]), read_load([child.pid])
        time.sleep(0.5)
        as_other, as_own = others_share(before, read_load([])), others_share(before_own, read_load([child.pid]))
    finally:
        child.kill()
        child.wait()
    assert 0.0 <= as_own < as_other <= 1.1

"""The tiles' library is compiled by the first process that needs it and read by the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from numba import types
from numba.core.codegen import JITCodeLibrary
from chunkwise.model.kernels import library, tiles
from chunkwise.model.kernels.compile import entry

library._waiting.clear()
seven = tiles.tile("seven", 1, lambda b, args: b.mul(args[0], args[0].type(7)), types.int64)
compiled = []
finalize = JITCodeLibrary.finalize
JITCodeLibrary.finalize = lambda self: (compiled.append(self.name), finalize(self))[1]

@entry
def run(x):
    return seven(x) + seven(1)

print(run(5), compiled.count("chunkwise_tiles"))
"""


FULL_DISK = """
from chunkwise.model.kernels import library

def full(file, data):
    raise OSError(28, "No space left on device")

library._write = full
"""


def run(cache: Path, before: str = "") -> str:
    # numba keeps nothing of functions without a file.
    script = cache / "script.py"
    script.write_text(before + SCRIPT)
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_second_process_reads_what_the_first_compiled(tmp_path: Path) -> None:
    assert run(tmp_path) == "42 1"
    assert run(tmp_path) == "42 0"


def test_a_spoilt_file_is_made_anew(tmp_path: Path) -> None:
    assert run(tmp_path) == "42 1"
    (file,) = tmp_path.glob("*/tiles-*")
    file.write_bytes(b"")
    assert run(tmp_path) == "42 1"
    assert run(tmp_path) == "42 0"


def test_a_full_disk_costs_the_next_process_its_time_and_nothing_else(tmp_path: Path) -> None:
    assert run(tmp_path, FULL_DISK) == "42 1"
    assert run(tmp_path) == "42 1"

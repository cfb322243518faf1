"""What reading a tokenizer leaves on the heap goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

# In a process of its own, because the heap of this one has room of earlier tests.
CODE = """
import os, pathlib, sys
from chunkwise.heap import trim_heap
from chunkwise.tokenizer import Tokenizer

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

tokenizer = Tokenizer(pathlib.Path(sys.argv[1]))
before = resident()
trim_heap()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tokenizer_leaves_nothing_to_trim(tmp_path: Path) -> None:
    words = {"[UNK]": 0} | {f"word number {i}": i for i in range(1, 100_000)}
    FastTokenizer(models.WordLevel(vocab=words, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 20

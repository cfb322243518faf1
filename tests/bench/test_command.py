"""`chunkwise bench` as a user runs it, on the tiny model: a live server beside transformers + PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TinyWorld


def bench(tiny: TinyWorld, work: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    adapters = ",".join(str(tiny.adapters[name]) for name in ("a4", "a16"))
    command = [sys.executable, "-m", "chunkwise", "bench", f"--model-id={tiny.model}", f"--adapters={adapters}"]
    command += [f"--work={work}", "--threads=1", "--rounds=1", "--new-tokens=4", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_last_line_is_json_and_all_engines_agree(tiny: TinyWorld, tmp_path: Path) -> None:
    done = bench(tiny, tmp_path, "--scenarios=mixed8", "--serve-flags=--max-batch-total-tokens=8192")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["left_out"].keys() == {"llama", "vllm"}
    assert document["engines"]["peft"]["versions"].keys() == {"transformers", "peft", "torch"}
    (ours, peft) = document["scenarios"]["mixed8"]["rows"]
    assert (ours["engine"], peft["engine"]) == ("chunkwise", "peft")
    assert ours["agrees"] == peft["agrees"] == 1.0
    assert ours["mean_rank"] == 10.0  # four adapters of rank 4 and four of rank 16
    assert ours["server_forward_decode_steps"] >= 3
    assert {name.split()[0] for name in ours["peak_rss_mb_by_process"]} == {"serve", "shard", "router"}
    assert [target["what"] for target in document["targets"]] == ["tok/s against PEFT adapter_names"]


def test_what_cannot_be_measured_ends_in_one_line(tiny: TinyWorld, tmp_path: Path) -> None:
    done = bench(tiny, tmp_path, "--scenarios=trace")
    assert done.returncode == 1
    assert done.stderr == "chunkwise: the scenario trace needs --trace FILE\n"

"""The script says so when there is nothing to check, and its parts run on whatever device they are given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import TinyWorld
from gpu_check import bench, check_model, compare

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "gpu_check.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to check")
def test_without_a_device_it_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "gpu_check: no CUDA device; nothing was checked\n"


def test_a_device_is_compared_with_the_cpu(tiny: TinyWorld) -> None:
    results = check_model(tiny.model, torch.device("cpu"), [torch.float32])
    assert set(results) == {
        f"{what}, float32{pages}" for what in ("model", "graphs") for pages in ("", ", small pages")
    }
    assert all(result["ok"] and result["error"] == 0.0 for result in results.values())


def test_wrong_logits_are_noticed() -> None:
    right = [torch.randn(3, 7), torch.randn(2, 7)]
    assert compare(right, right, 0.0)["ok"]
    assert not compare([right[0], right[1] + 0.1], right, 1e-3)["ok"]
    assert not compare([right[0], right[1] * float("nan")], right, 1e-3)["ok"]


def test_the_benchmark_prints_as_json(tiny: TinyWorld) -> None:
    report = json.loads(json.dumps(bench(tiny.model, torch.float32, torch.device("cpu"), [1, 2], 1, prompt=64)))
    assert len(report["decode"]) == 12
    assert all(row["ms"] > 0 for row in report["decode"])
    assert report["prefill_ms"] > 0

"""The bench of the router runs, with a shard that only waits, and reports what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny import make_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_router.py"


def test_two_streams_through_a_stub(tmp_path: Path) -> None:
    make_model(tmp_path, max_position_embeddings=2048)
    flags = [f"--model={tmp_path}", "--streams=2", "--steps=40", "--step-ms=5"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=300, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["streams"], result["step_ms"], result["steered"]) == (2, 5.0, True)
    for side in ("alone", "served"):
        assert result[side]["steps"] >= 3 and result[side]["step"] >= 5.0
    assert 0.0 < result["gap_share_of_step"] < 1.0 and result["served"]["router_cpu"] > 0.0

"""Seconds from starting `chunkwise serve` to its first answer, with kernels to compile and with kernels on disk.

    .venv/bin/python scripts/bench_start.py --adapter ../shared/adapters/squad-r32

One shard, all cores; the model is in the page cache. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from fetch_model import cache_directory
from live import live_server, post


def seconds(model: Path, adapter: Path) -> dict[str, float]:
    """Until the server says that it is ready, and until it has answered one request of 8 tokens."""
    began = time.monotonic()
    with live_server(model, adapter) as (url, _):
        ready = time.monotonic() - began
        post(f"{url}/generate", {"inputs": "Hello", "parameters": {"adapter_id": "adapter", "max_new_tokens": 8}})
        return {"ready_s": round(ready, 1), "answered_s": round(time.monotonic() - began, 1)}


def main() -> None:
    """Starts the server three times: once to warm the page cache, cold, warm."""
    parser = argparse.ArgumentParser(description="Measures how long the server takes to start.")
    parser.add_argument("--model", type=Path, default=cache_directory(os.environ))
    parser.add_argument("--adapter", type=Path, default=Path("adapters/demo-squad-r8"))
    arguments = parser.parse_args()
    model = arguments.model
    seconds(model, arguments.adapter)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["NUMBA_CACHE_DIR"] = empty
        cold = seconds(model, arguments.adapter)
        warm = seconds(model, arguments.adapter)
    print(json.dumps({"cpus": os.cpu_count(), "cold": cold, "warm": warm}))


if __name__ == "__main__":
    main()

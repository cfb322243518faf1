"""Milliseconds per token of one greedy stream with one adapter, fp32: ChunkWise over HTTP against transformers + PEFT.

    .venv/bin/python scripts/bench.py --adapter ../shared/adapters/squad-r32

Both engines take turns in one run with the same weights, prompt (128 tokens), adapter and number of threads; the first
round is discarded and medians are reported. ChunkWise is timed from the client's side, so HTTP, router and gRPC count.
A table comes first; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fetch_model import cache_directory
from live import children, live_server, peak_resident_bytes

TEXT = (
    "The harbour master wrote down the names of all the ships that had come in since the storm, and beside each one "
    "what it carried and who had paid for it. Some held salt and timber, some grain, and one a cargo of clocks. "
)
PROMPT_TOKENS = 128


def stream_gaps(url: str, prompt: str, adapter: str | None, new: int) -> tuple[float, list[float]]:
    """Time to the first token and the gaps between tokens of one streamed answer, in milliseconds."""
    parameters: dict[str, Any] = {"max_new_tokens": new}
    if adapter:
        parameters["adapter_id"] = adapter
    body = json.dumps({"inputs": prompt, "parameters": parameters}).encode()
    request = urllib.request.Request(f"{url}/generate_stream", body, {"content-type": "application/json"})
    times = [time.perf_counter()]
    with urllib.request.urlopen(request, timeout=600) as response:
        for line in response:
            if line.startswith(b"data:"):
                event = json.loads(line[5:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                times.append(time.perf_counter())
    gaps = [1000 * (b - a) for a, b in pairwise(times)]
    return gaps[0], gaps[1:]


class Peft:
    """transformers + PEFT with a static prompt, stepped by hand with a KV cache, so that only the forward is timed."""

    def __init__(self, model: Path, adapter: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model = PeftModel.from_pretrained(base, str(adapter)).eval()

    def gaps(self, ids: list[int], new: int, *, adapter: bool) -> tuple[float, list[float]]:
        """As `stream_gaps`, for greedy decoding in this process, with or without the adapter."""
        if adapter:
            return self._gaps(ids, new)
        with self._model.disable_adapter():
            return self._gaps(ids, new)

    @torch.inference_mode()
    def _gaps(self, ids: list[int], new: int) -> tuple[float, list[float]]:
        times = [time.perf_counter()]
        output = self._model(torch.tensor([ids]), use_cache=True)
        for _ in range(new - 1):
            times.append(time.perf_counter())
            token = output.logits[:, -1:].argmax(-1)
            output = self._model(token, past_key_values=output.past_key_values, use_cache=True)
        times.append(time.perf_counter())
        gaps = [1000 * (b - a) for a, b in pairwise(times)]
        return gaps[0], gaps[1:]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per engine and adapter setting, medians over the rounds."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)  # type: ignore[no-untyped-call]
    ids = tokenizer(TEXT * 4)["input_ids"][:PROMPT_TOKENS]
    prompt = tokenizer.decode(ids)
    assert tokenizer(prompt)["input_ids"] == ids, "the prompt must survive the round trip to be the same for both"
    peft = Peft(args.model, args.adapter)
    # Every round sends the same prompt; reusing it would make the time to the first token look better than it is.
    flags = (
        "--disable-prefix-caching",
        "--dtype=float32",
        f"--threads={args.threads}",
        f"--num-shard={args.num_shard}",
    )
    with (
        live_server(args.model, args.adapter, *flags, "--no-steering") as (plain, pid),
        live_server(args.model, args.adapter, *flags) as (steered, _),
    ):
        runs: dict[tuple[str, str], Callable[[], tuple[float, list[float]]]] = {
            ("chunkwise", "base"): lambda: stream_gaps(plain, prompt, None, args.new_tokens),
            ("chunkwise", "adapter, full rank"): lambda: stream_gaps(plain, prompt, "adapter", args.new_tokens),
            ("chunkwise", "adapter, steered"): lambda: stream_gaps(steered, prompt, "adapter", args.new_tokens),
            ("transformers", "base"): lambda: peft.gaps(ids, args.new_tokens, adapter=False),
            ("transformers + PEFT", "adapter, full rank"): lambda: peft.gaps(ids, args.new_tokens, adapter=True),
        }
        results: dict[tuple[str, str], list[tuple[float, list[float]]]] = {key: [] for key in runs}
        for _ in range(args.rounds + 1):
            for key, run in runs.items():
                results[key].append(run())
        shard_peak = max(peak_resident_bytes(child) for child in children(pid))
    rows = []
    for (engine, setting), rounds in results.items():
        kept = rounds[1:]
        row = {
            "engine": engine,
            "setting": setting,
            "ms_per_token": round(statistics.median(gap for _, gaps in kept for gap in gaps), 2),
            "time_to_first_token_ms": round(statistics.median(first for first, _ in kept), 1),
        }
        if engine == "chunkwise" and setting == "adapter, full rank":
            row["shard_peak_rss_mb"] = round(shard_peak / 1e6)
        rows.append(row)
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=cache_directory(os.environ))
    parser.add_argument("--adapter", type=Path, default=Path("adapters/demo-squad-r8"))
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--num-shard", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args)
    print(f"{'engine':<22}{'setting':<22}{'ms/token':>10}{'first token ms':>16}")
    for row in rows:
        print(f"{row['engine']:<22}{row['setting']:<22}{row['ms_per_token']:>10}{row['time_to_first_token_ms']:>16}")
    by_key = {(row["engine"], row["setting"]): row["ms_per_token"] for row in rows}
    ours, theirs = by_key["chunkwise", "adapter, full rank"], by_key["transformers + PEFT", "adapter, full rank"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads"
    print(
        json.dumps(
            {
                "machine": machine,
                "commit": commit.stdout.strip(),
                "prompt_tokens": PROMPT_TOKENS,
                "rows": rows,
                "ratio_to_peft": round(ours / theirs, 3),
            }
        )
    )


if __name__ == "__main__":
    main()

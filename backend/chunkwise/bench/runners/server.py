"""ChunkWise itself: starts `chunkwise serve` and asks over HTTP, as clients do; so HTTP, router and gRPC count."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version

import aiohttp

from chunkwise.bench.runners.protocol import Json, RunResult, StartOrder, StreamOrder, StreamResult, process_tree

_LIMIT_S = 1800


class Engine:
    """A server in its own processes; this one is only the client."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._url = ""

    def start(self, order: StartOrder) -> Json:
        """Starts the server; prompts are computed anew every time, as the rivals do."""
        adapters = ",".join(f"{name}={path}" for name, path in order.adapters.items())
        flags = [
            f"--model-id={order.model}",
            f"--lora-adapters={adapters}",
            f"--dtype={order.dtype}",
            f"--threads={order.threads}",
            f"--max-concurrent-requests={max(order.streams, 128)}",
            "--port=0",
            "--hostname=127.0.0.1",
            "--disable-prefix-caching",
            *order.options,
        ]
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chunkwise", "serve", *flags], stdout=subprocess.PIPE, text=True
        )
        self._url = _ready_url(self._process)
        ready = time.perf_counter() - began
        return {
            "versions": {"chunkwise": version("chunkwise"), "torch": version("torch")},
            "settings": {"flags": [flag for flag in flags if not flag.startswith(("--lora", "--model"))]},
            "start_seconds": round(ready, 1),
        }

    def run(self, streams: Sequence[StreamOrder]) -> RunResult:
        """All streams at once, each over its own connection."""
        before = self._steps()
        results = asyncio.run(_ask_all(self._url, streams))
        after = self._steps()
        server = {}
        for name, (seconds, count) in after.items():
            seconds_before, count_before = before.get(name, (0.0, 0.0))
            if count > count_before:
                server[f"{name}_ms"] = round(1000 * (seconds - seconds_before) / (count - count_before), 3)
                server[f"{name}_steps"] = count - count_before
        return RunResult(results, [list(range(len(streams)))], server)

    def pids(self) -> list[int]:
        """Launcher, router and shards."""
        return process_tree(self._process.pid) if self._process is not None else []

    def stop(self) -> None:
        """Ends the server."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(120)

    def _steps(self) -> dict[str, tuple[float, float]]:
        """Seconds and number of the steps so far, by kind: ``forward_decode``, ``batch_prefill`` and so on; ``batch``
        is the whole step as the router sees it, ``forward`` the model alone."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=60) as response:
            return parse_steps(response.read().decode())


def parse_steps(metrics: str) -> dict[str, tuple[float, float]]:
    """Sum in seconds and count of TGI's two histograms of step times, out of the text of ``/metrics``."""
    found: dict[str, dict[str, float]] = {}
    for line in metrics.splitlines():
        head, _, value = line.rpartition(" ")
        for kind, family in (("forward", "tgi_batch_forward_duration"), ("batch", "tgi_batch_inference_duration")):
            for part in ("sum", "count"):
                prefix = f'{family}_{part}{{method="'
                if head.startswith(prefix):
                    method = head[len(prefix) :].split('"')[0]
                    found.setdefault(f"{kind}_{method}", {})[part] = float(value)
    return {name: (parts["sum"], parts["count"]) for name, parts in found.items()}


async def _ask_all(url: str, streams: Sequence[StreamOrder]) -> list[StreamResult]:
    timeout, connector = aiohttp.ClientTimeout(total=_LIMIT_S), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        begin = time.perf_counter()
        return await asyncio.gather(*(_ask(session, stream, begin) for stream in streams))


async def _ask(session: aiohttp.ClientSession, stream: StreamOrder, begin: float) -> StreamResult:
    """Streams one answer. Lines are parsed afterwards, or parsing would take time from the server on the same cores."""
    parameters: Json = {"max_new_tokens": stream.new_tokens, "chunk_details": True}
    if stream.adapter is not None:
        parameters["adapter_id"] = stream.adapter
    await asyncio.sleep(max(0.0, begin + stream.start_ms / 1000 - time.perf_counter()))
    asked, moments, lines = time.perf_counter(), [], []
    async with session.post("/generate_stream", json={"inputs": stream.text, "parameters": parameters}) as response:
        async for line in response.content:
            if line.startswith(b"data:"):
                moments.append(time.perf_counter())
                lines.append(line)
    events = [json.loads(line[5:]) for line in lines]
    for event in events:
        if "error" in event:
            raise RuntimeError(f"the server answered {event['error']}")
    if not events:
        raise RuntimeError(f"the server answered with status {response.status} and no event")
    return StreamResult(
        times_ms=[1000 * (moment - asked) for moment in moments],
        ids=[event["token"]["id"] for event in events],
        start_ms=1000 * (asked - begin),
        mean_rank=answer_rank(events[-1]["details"]),
    )


def answer_rank(details: Json) -> float | None:
    """Mean of the chunks' ranks over the computed positions of the answer alone, since that is what decoding spends;
    None for an answer of one token, which has none."""
    start, ranked, length = details["input_length"], 0.0, 0
    for chunk in details["chunks"]:
        inside = max(0, chunk["end"] - max(chunk["start"], start))
        ranked += inside * chunk["rank"]
        length += inside
    return ranked / length if length else None


def _ready_url(process: subprocess.Popen[str]) -> str:
    """Reads the log up to the ready line, and on in the background, so that the server never waits for a reader."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "ready on http" in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return line.split("ready on ")[1].strip()
    raise RuntimeError("the server did not become ready:\n" + "".join(seen[-20:]))

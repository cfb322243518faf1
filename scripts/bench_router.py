"""What router and wire cost per decode step: many steered HTTP streams over a shard whose model is a stub.

    .venv/bin/python scripts/bench_router.py --streams 64 --step-ms 100

A router process, a shard process (scripts/stub_shard.py: all of the shard but the model, which burns time) and this
client. Reported in milliseconds per step, medians: what the shard does beside its forward pass, the gap between two
steps, in which the model waits for the router, and the CPU time of router and shard. ``--step-ms 0`` takes the real
model.
``--profile DIR`` writes profiles of router and engine there (slower: take no times from that run).
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from fetch_model import cache_directory
from stub_shard import STUB_ADAPTERS, prompt

SCRIPTS = Path(__file__).parent
_KEPT_FULL = '[kv]\nkind = "full"\n'


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


@contextmanager
def process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python process, asked to end at the end of the block, and waited for."""
    child = subprocess.Popen([sys.executable, *command], text=True, **options)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(60)


def router_address(log: IO[str]) -> tuple[str, int]:
    """Reads a router's log up to the line that tells where it serves."""
    seen = []
    for line in log:
        seen.append(line)
        if " on http://" in line:
            url = urlsplit(line.split(" on ")[-1].strip().strip('"'))
            assert url.port is not None
            return "127.0.0.1", url.port
    raise RuntimeError("the router did not start:\n" + "".join(seen))


def http_request(stream: int, tokens: int, adapter: str | None) -> bytes:
    """The bytes of one streamed generate request."""
    parameters: dict[str, Any] = {"max_new_tokens": tokens, "adapter_id": adapter}
    body = json.dumps({"inputs": prompt(stream), "parameters": parameters}).encode()
    head = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + body


@dataclass(slots=True)
class Use:
    """CPU milliseconds per step of the router and of this client."""

    router: float
    client: float


def stream_all(address: tuple[str, int], requests: list[bytes], tokens: int, router_pid: int) -> Use:
    """Reads all answers at once to their ends; CPU times are those of the middle of the run."""
    selector = selectors.DefaultSelector()
    for request in requests:
        connection = socket.create_connection(address)
        connection.sendall(request)
        selector.register(connection, selectors.EVENT_READ)
    first, last = len(requests) * 10, len(requests) * (tokens - 5)
    marks: list[tuple[int, float, float]] = []
    events = 0
    while selector.get_map():
        for key, _ in selector.select():
            stream = key.fileobj
            assert isinstance(stream, socket.socket)
            data = stream.recv(1 << 16)
            if b'"error"' in data:
                raise RuntimeError(data.decode())
            events += data.count(b"data:")
            if not data:
                selector.unregister(stream)
                stream.close()
        if (events >= first and not marks) or (events >= last and len(marks) == 1):
            marks.append((events, cpu_seconds(router_pid), time.process_time()))
    if events != len(requests) * tokens:
        raise RuntimeError(f"{events} events came, {len(requests) * tokens} were expected")
    (e0, r0, c0), (e1, r1, c1) = marks
    steps = (e1 - e0) / len(requests)
    return Use(round(1e3 * (r1 - r0) / steps, 3), round(1e3 * (c1 - c0) / steps, 3))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run."""
    url, record = f"unix://{folder}/shard-0", folder / "record.json"
    policy = folder / "policy.toml"
    policy.write_text("" if args.step_ms else _KEPT_FULL, encoding="utf-8")
    shard = [
        str(SCRIPTS / "stub_shard.py"),
        f"--model={args.model}",
        f"--url={url}",
        f"--record={record}",
        f"--streams={args.streams}",
        f"--steps={args.steps}",
        f"--step-ms={args.step_ms}",
        f"--threads={args.threads}",
        *([f"--profile={args.profile}/engine.prof"] if args.profile else []),
    ]
    router = [
        *(["-m", "cProfile", "-o", f"{args.profile}/router.prof"] if args.profile else []),
        *("-m", "chunkwise", "router", "--port=0", "--hostname=127.0.0.1"),
        f"--model-id={args.model}",
        f"--shard-urls={url}",
        "--max-batch-prefill-tokens=65536",
        *(["--no-steering"] if args.no_steering else [f"--policy={policy}"]),
    ]
    adapters: tuple[str | None, ...] = STUB_ADAPTERS if args.step_ms else (None,)
    requests = [http_request(i, args.steps, adapters[i % len(adapters)]) for i in range(args.streams)]
    with process(shard), process(router, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        assert child.stdout is not None
        use = stream_all(router_address(child.stdout), requests, args.steps, child.pid)
    times: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    times["served"] |= {"router_cpu": use.router, "client_cpu": use.client}
    return times


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=cache_directory(os.environ))
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=120, help="tokens per stream")
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of the stub's step; 0: the real model")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the shard")
    parser.add_argument("--no-steering", action="store_true")
    parser.add_argument("--profile", type=Path, help="existing directory for profiles")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(args, Path(folder))
    alone, served = times["alone"], times["served"]
    print(f"{'ms per step':<16}{'alone':>10}{'served':>10}")
    for name in served:
        print(f"{name:<16}{alone.get(name, ''):>10}{served[name]:>10}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit.stdout.strip(),
        "streams": args.streams,
        "step_ms": args.step_ms,
        "steered": not args.no_steering,
    }
    print(json.dumps(about | times | {"gap_share_of_step": round(served["gap"] / served["step"], 4)}))


if __name__ == "__main__":
    main()

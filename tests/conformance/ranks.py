"""`text-generation-server serve` as TGI's launcher starts it: a process per rank, ready when all sockets are there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAM = (sys.executable, "-c", "from chunkwise.launcher.tgi_cli import main; main()")
START_SECONDS = 90.0
LEVELS = {"TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"}


@dataclass(frozen=True, slots=True)
class Rank:
    """One running process and the files that hold what it wrote."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def family(self) -> list[int]:
        """Its process id and those of its children."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def end(self, seconds: float = 30.0) -> int:
        """Its exit status after SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet reaped does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def environment(adapters: Mapping[str, Path], **changes: str) -> dict[str, str]:
    """What TGI's launcher gives a shard, over an environment without its variables."""
    ours = ("CHUNKWISE_", "MAX_", "PORT", "HOSTNAME", "RANK", "WORLD_SIZE", "REQUEST_LOGPROBS")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
        "LORA_ADAPTERS": ", ".join(f"{name}={path}" for name, path in adapters.items()),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "CUDA_MEMORY_FRACTION": "1",
        "SAFETENSORS_FAST_GPU": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ENABLE_HF_TRANSFER": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_GRAPHS": "1,2,4,8,16,32",
        "ATTENTION": "paged",
        "PREFIX_CACHING": "0",
        "OMP_NUM_THREADS": "1",
        "MAX_BATCH_TOTAL_TOKENS": "16384",
        **changes,
    }


def start(place: Path, model: Path, env: Mapping[str, str], *flags: str, level: str = "INFO") -> Rank:
    """Starts one rank, which will take ``place``/s-RANK, with its flags in the launcher's order."""
    command = [*PROGRAM, "serve", str(model), "--uds-path", f"{place}/s", "--logger-level", level, "--json-output"]
    out, err = (place / f"{name}-{env['RANK']}" for name in ("out", "err"))
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen([*command, *flags], stdout=stdout, stderr=stderr, env=dict(env))
    return Rank(process, out, err)


def await_sockets(place: Path, ranks: Sequence[Rank]) -> None:
    """Returns when every rank's socket is there, as the launcher does."""
    deadline = time.monotonic() + START_SECONDS
    while not all((place / f"s-{rank}").is_socket() for rank in range(len(ranks))):
        assert time.monotonic() < deadline, "no socket"
        assert all(rank.process.poll() is None for rank in ranks), [rank.err.read_text() for rank in ranks]
        time.sleep(0.02)


@contextmanager
def ended(ranks: Sequence[Rank]) -> Iterator[None]:
    """Ends the ranks on leaving; then nothing may be left of them."""
    try:
        yield
    finally:
        families = [pid for rank in ranks if rank.process.poll() is None for pid in rank.family()]
        for rank in ranks:
            rank.end()
        assert not any(alive(pid) for pid in families)


@contextmanager
def serving(
    place: Path, model: Path, adapters: Mapping[str, Path], world_size: int, **env: str
) -> Iterator[list[Rank]]:
    """All ranks of one server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = [*(["--sharded"] if world_size > 1 else []), "--otlp-service-name", "text-generation-inference.router"]
    places = {"WORLD_SIZE": str(world_size), "MASTER_PORT": port}
    ranks = [
        start(place, model, environment(adapters, RANK=str(rank), **places, **env), *flags)
        for rank in range(world_size)
    ]
    with ended(ranks):
        await_sockets(place, ranks)
        yield ranks

"""Live processes: `chunkwise serve` on the tiny model, as a user would start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chunkwise.model.spec import load_spec
from chunkwise_adapters.format import load_adapter
from chunkwise_adapters.ladder import build_ladder
from conftest import TinyWorld


@dataclass(frozen=True)
class Server:
    """A running service."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and parsed JSON; ``body`` may be raw bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def get(self, path: str) -> str:
        """Body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read().decode()

    def generate(self, text: str, **parameters: Any) -> dict[str, Any]:
        """The answer of /generate; fails on any status but 200."""
        status, answer = self.post("/generate", {"inputs": text, "parameters": parameters})
        assert status == 200, answer
        return answer

    def metric(self, name: str) -> dict[str, float]:
        """Samples of one metric by their labels."""
        samples = {}
        for line in self.get("/metrics").splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name:
                samples[head.removeprefix(name)] = float(value)
        return samples

    def descendants(self) -> list[int]:
        """Process ids of router and shards."""
        return _children(self.process.pid)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(child) for child in path.read_text().split()] if path.exists() else []
    return [*direct, *(deeper for child in direct for deeper in _children(child))]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@contextmanager
def running(tiny: TinyWorld, log: Path, *flags: str) -> Iterator[Server]:
    """`chunkwise serve` with all tiny adapters on a free port, until the block ends."""
    adapters = ",".join(f"{name}={path}" for name, path in tiny.adapters.items())
    command = [sys.executable, "-m", "chunkwise", "serve", "--port=0", "--threads=1", "--hostname=127.0.0.1"]
    command += [f"--model-id={tiny.model}", f"--lora-adapters={adapters}", "--max-batch-total-tokens=8192", *flags]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=_env())
    try:
        yield Server(_ready_url(process, log), process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(30)


def _env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PORT", "MODEL_ID", "LORA_ADAPTERS")}


def _ready_url(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if "ready on http" in line:
                return line.split("ready on ")[1].strip()
        time.sleep(0.1)
    raise AssertionError(f"not ready:\n{log.read_text()}")


@pytest.fixture(scope="session")
def policy(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy file under which ranks move: by token prices for adapter a16, by complexity for the others."""
    weights = load_adapter(tiny.adapters["a16"], "a16", load_spec(tiny.model).target_shapes())
    ladder = build_ladder(weights, allocation="global")
    cheap, dear = ([price] * (len(ladder.rungs) - 1) + [0.0] for price in (0.0, 9.0))
    tokens = [[token_id, *dear] for token_id in range(0, 256, 3)]
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_text(
        f'[chunker]\nmin_length = 4\n[rank]\nsource = "complexity"\n[adapters.a16]\n'
        f'content_hash = "{ladder.content_hash}"\nrungs = {list(ladder.rungs)}\n'
        f"kept_energy = {list(ladder.kept_energy)}\nanswer_rung = 2\nprice_per_rank = 0.01\n"
        f"answer_tokens = {[[token_id, 16] for token_id in range(0, 256, 2)]}\n"
        f"[adapters.a16.prices]\ndefault = {cheap}\ntokens = {tokens}\n"
    )
    return path


@pytest.fixture(scope="session")
def two_shards(tiny: TinyWorld, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Router, steering on, two tensor-parallel shards."""
    with running(tiny, tmp_path_factory.mktemp("two") / "log", "--num-shard=2", f"--policy={policy}") as server:
        yield server


@pytest.fixture(scope="session")
def plain(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Router without steering, one shard."""
    with running(tiny, tmp_path_factory.mktemp("plain") / "log", "--no-steering") as server:
        yield server


def wait_for(what: str, condition: Any, seconds: float = 10.0) -> None:
    """Fails unless ``condition()`` becomes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds:g} s")

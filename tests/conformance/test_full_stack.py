"""Checklist items 49 and 50: TGI's own launcher and router over our server. Run by scripts/full_stack."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conformance.ranks import START_SECONDS
from conftest import TinyWorld

LAUNCHER = shutil.which("text-generation-launcher")
ABSENT = "text-generation-launcher is not on PATH: items 49 and 50 not run"
pytestmark = pytest.mark.skipif(LAUNCHER is None, reason=ABSENT)


class Stack:
    """A running launcher with its router on ``port``."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Status and body."""
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def healthy(self) -> bool:
        """Whether /health says so."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def await_health(self) -> None:
        """Returns once the router serves."""
        deadline = time.monotonic() + START_SECONDS
        while not self.healthy():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def children(self, name: str) -> list[int]:
        """Ids of the launcher's children whose command line holds ``name``."""
        pid = self.process.pid
        ids = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [id for id in ids if name in Path(f"/proc/{id}/cmdline").read_text()]


@contextmanager
def launched(tiny: TinyWorld, place: Path) -> Iterator[Stack]:
    """The launcher over the tiny model, in a directory of its own."""
    assert LAUNCHER is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--model-id", str(tiny.model), "--port", str(port), "--shard-uds-path", f"{place}/s", "--usage-stats=off"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "LORA_ADAPTERS": f"a16={tiny.adapters['a16']}"}
    with (place / "log").open("w") as log:
        process = subprocess.Popen([LAUNCHER, *flags], stdout=log, stderr=log, env=env, cwd=place)
    stack = Stack(process, port)
    try:
        stack.await_health()
        yield stack
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def test_item_49_the_http_api(tiny: TinyWorld, tmp_path: Path) -> None:
    chat = {"model": "tgi", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    with launched(tiny, tmp_path) as stack:
        for parameters in ({"max_new_tokens": 8}, {"max_new_tokens": 8, "best_of": 2, "do_sample": True}):
            status, answer = stack.post("/generate", {"inputs": "Hello", "parameters": parameters | {"details": True}})
            assert status == 200
            assert json.loads(answer)["details"]["generated_tokens"] >= 1
        body = {"inputs": "Hello", "parameters": {"max_new_tokens": 8}}
        status, events = stack.post("/generate_stream", body)
        assert status == 200
        assert events.count("data:") >= 1
        # The tiny model has no chat template; what matters is that the router says so and lives.
        assert stack.post("/v1/chat/completions", chat)[0] in (200, 422)
        assert stack.post("/v1/chat/completions", chat | {"stream": True})[0] in (200, 422)
        status, answer = stack.post("/v1/completions", {"model": "tgi", "prompt": ["one", "two"], "max_tokens": 4})
        assert status == 200
        assert sorted(choice["index"] for choice in json.loads(answer)["choices"]) == [0, 1]
        with ThreadPoolExecutor(200) as pool:
            statuses = list(pool.map(lambda _: stack.post("/generate", body)[0], range(200)))
        assert set(statuses) <= {200, 429}
        assert statuses.count(200) >= 128
        assert stack.healthy()


def test_item_50_a_killed_shard_ends_the_launcher(tiny: TinyWorld, tmp_path: Path) -> None:
    with launched(tiny, tmp_path) as stack:
        (shard,) = stack.children("text-generation-server")
        os.kill(shard, signal.SIGKILL)
        assert stack.process.wait(120) != 0

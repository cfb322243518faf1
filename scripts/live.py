"""Starts `chunkwise serve` for a script and speaks to it over HTTP. Measures nothing itself."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def post(url: str, body: dict[str, Any]) -> Any:
    """The JSON answer to one POST. Raises urllib.error.HTTPError for a refused request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


@contextmanager
def live_server(model: Path, adapter: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """The url and the launcher's process id of a server with one adapter named ``adapter``, on a free port."""
    command = [sys.executable, "-m", "chunkwise", "serve", f"--model-id={model}", f"--lora-adapters=adapter={adapter}"]
    process = subprocess.Popen([*command, "--port=0", *flags], stdout=subprocess.PIPE, text=True)
    try:
        yield _ready_url(process), process.pid
    finally:
        process.terminate()
        process.wait(60)


def _ready_url(process: subprocess.Popen[str]) -> str:
    """Reads the log up to the ready line, and on in the background, so that the server never waits for a reader."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "ready on http" in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return line.split("ready on ")[1].strip()
    raise RuntimeError("the server did not become ready:\n" + "".join(seen))

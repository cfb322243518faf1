"""Process supervision: starts commands, ends them together. Knows nothing of models or flags."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from chunkwise.core import ChunkwiseError
from chunkwise.lifetime import PARENT_VARIABLE

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1


class ProcessFailed(ChunkwiseError):
    """A supervised process ended by itself."""


class Supervisor:
    """Runs several processes as one. SIGTERM and SIGINT of this process set ``stopping``.

    Args:
        grace_seconds: how long a process may take to end after SIGTERM before it is killed.
    """

    def __init__(self, grace_seconds: float = 75.0) -> None:
        self.stopping = False
        self._grace = grace_seconds
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Starts a process in its own group, so that a terminal's Ctrl-C reaches this process alone."""
        env = {**env, PARENT_VARIABLE: str(os.getpid())}
        self._processes[name] = subprocess.Popen(command, env=env, start_new_session=True)

    def check(self) -> None:
        """Raises ProcessFailed if a process has ended."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is not None and not self.stopping:
                raise ProcessFailed(f"{name} ended with status {code}; its log above says why")

    def wait(self) -> None:
        """Blocks until this process is told to stop. Raises ProcessFailed if a process ends before that."""
        while not self.stopping:
            self.check()
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Ends all processes, the last started first: the router before the shards it drives."""
        for name, process in reversed(self._processes.items()):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(self._grace)
                except subprocess.TimeoutExpired:
                    logger.warning("%s did not end within %g s; killing it", name, self._grace)
                    process.kill()
                    process.wait()

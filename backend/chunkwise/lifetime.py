"""Ties a process's life to that of the process that started it (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# Set by the supervisor in the environment of the processes it starts: its own process id.
PARENT_VARIABLE = "CHUNKWISE_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Makes the kernel send SIGTERM to this process when process ``parent`` dies, however that happens; ends at once if
    that has happened already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(f"the process {parent} that started this one is gone")

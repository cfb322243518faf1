"""How much of the machine others used while an engine was measured. It cannot tell who they were."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_IDLE, _WAITING = 3, 4


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds of processor time so far, of all processes and of some, at one moment of a machine with ``cores``."""

    moment: float
    cores: int
    everyone: float
    own: float


def read_load(pids: Sequence[int]) -> Load:
    """The load now, with ``pids`` as the own processes. What the hypervisor stole counts as everyone's."""
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    cores = sum(line.startswith("cpu") for line in lines) - 1
    fields = [int(field) for field in lines[0].split()[1:9]]
    busy = sum(fields) - fields[_IDLE] - fields[_WAITING]
    return Load(time.perf_counter(), cores, busy / _TICKS, sum(map(_process_ticks, pids)) / _TICKS)


def others_share(before: Load, after: Load) -> float:
    """Share of the machine, 0..1, that went to other processes than the own ones between two moments."""
    others = (after.everyone - before.everyone) - (after.own - before.own)
    return max(0.0, others / (before.cores * (after.moment - before.moment)))


def _process_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])

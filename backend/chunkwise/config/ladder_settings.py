"""What ``chunkwise ladder`` is told: frozen values made from parsed flags, checked before anything is loaded."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chunkwise.config.calibrate_settings import parse_share
from chunkwise.config.flags import InvalidFlags
from chunkwise.core import rank_budget

LadderKind = Literal["plain", "whitened", "sensitive"]


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """``tokens`` tokens of the part ``share`` of ``file``, in windows of at most ``window``; ``target`` as in
    `TaskSettings`."""

    file: Path
    share: tuple[float, float]
    tokens: int
    window: int
    target: str


@dataclass(frozen=True, slots=True)
class LadderSettings:
    """Everything ``chunkwise ladder`` needs.

    ``calibration`` is None for a plain ladder alone; ``rungs`` None takes the default ones; ``out`` None
    saves in the adapter's directory; ``plot`` None draws nothing.
    """

    adapter: str
    model_id: str
    kind: LadderKind
    calibration: CalibrationSettings | None
    rungs: tuple[float, ...] | None
    allocation: Literal["uniform", "global"]
    out: Path | None
    plot: Path | None
    threads: int | None


def ladder_settings(args: argparse.Namespace) -> LadderSettings:
    """Settings of the ``ladder`` command. Raises InvalidFlags."""
    for name in ("calibration_tokens", "window", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidFlags(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    kind: LadderKind = args.kind or ("plain" if args.calibration is None else "sensitive")
    if kind != "plain" and args.calibration is None:
        raise InvalidFlags(f"--kind {kind} needs --calibration FILE, text or answers like those to be served")
    if kind == "plain" and args.calibration is not None:
        raise InvalidFlags("--kind plain takes no --calibration; drop one of them")
    if kind == "sensitive" and args.allocation == "uniform":
        raise InvalidFlags("--kind sensitive divides ranks among modules; drop --allocation uniform, or the kind")
    if args.plot is not None and args.plot.suffix != ".png":
        raise InvalidFlags(f"--plot is {args.plot}; give the name of a .png file")
    return LadderSettings(
        adapter=args.adapter,
        model_id=args.model_id,
        kind=kind,
        calibration=None
        if args.calibration is None
        else CalibrationSettings(
            args.calibration, parse_share(args.share), args.calibration_tokens, args.window, args.target
        ),
        rungs=None if args.rungs is None else parse_rungs(args.rungs),
        allocation=args.allocation,
        out=args.out,
        plot=args.plot,
        threads=args.threads,
    )


def parse_rungs(text: str) -> tuple[float, ...]:
    """Rank budgets by comma. Raises InvalidFlags."""
    try:
        rungs = tuple(float(part) for part in text.split(","))
    except ValueError:
        rungs = (math.nan,)
    if not all(map(math.isfinite, rungs)):
        raise InvalidFlags(f"--rungs is {text!r}; give numbers by comma, like 0,0.25,0.5,1,2,4")
    return tuple(map(rank_budget, rungs))

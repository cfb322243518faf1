"""``chunkwise ladder``: orders an adapter's ranks, saves the ladder for `serve`, and shows its spectrum."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from chunkwise.config.ladder_settings import LadderSettings, ladder_settings
from chunkwise.core import ChunkwiseError
from chunkwise.evaluation.calibration_text import read_calibration
from chunkwise.evaluation.fisher import measure_sensitivity
from chunkwise.evaluation.ladder_report import summary, tables
from chunkwise.evaluation.moments import collect_moments
from chunkwise.hub import locate
from chunkwise.model.identity import base_hash
from chunkwise.model.spec import load_spec
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.errors import AdapterError
from chunkwise_adapters.format import LoraWeights, load_adapter
from chunkwise_adapters.ladder import RankLadder, build_ladder
from chunkwise_adapters.ladder_file import LADDER_FILE, save_ladder
from chunkwise_adapters.sensitivity import Sensitivity
from chunkwise_adapters.whitening import ShrinkMoments


class LadderFailed(ChunkwiseError):
    """An adapter that no ladder can be made of, or a result that cannot be written."""


def run(args: argparse.Namespace) -> None:
    """Makes, saves and prints the ladder; the last line is JSON."""
    settings = ladder_settings(args)
    draw = _plotter() if settings.plot is not None else None
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    start = time.perf_counter()
    model_dir, adapter_dir = locate(settings.model_id, None), locate(settings.adapter, None)
    try:
        name = Path(settings.adapter).expanduser().resolve().name
        weights = load_adapter(adapter_dir, name, load_spec(model_dir).target_shapes())
        ladder = build_ladder(weights, settings.rungs, settings.allocation, _fitted(settings, model_dir, weights))
    except AdapterError as error:
        raise LadderFailed(str(error)) from error
    base, out = base_hash(model_dir), settings.out or adapter_dir / LADDER_FILE
    try:
        save_ladder(ladder, out, base)
        if draw is not None and settings.plot is not None:
            draw(ladder, settings.plot)
    except OSError as error:
        raise LadderFailed(f"the ladder cannot be written: {error}; choose another place with --out") from error
    seconds = time.perf_counter() - start
    print(f"{_headline(ladder, base)}\n\n{tables(ladder)}\n\nsaved to {out}, {out.stat().st_size} bytes")
    result = summary(ladder) | {"base_hash": base, "file": str(out), "file_bytes": out.stat().st_size}
    print(json.dumps(result | {"seconds": round(seconds, 3)}))


def _plotter() -> Callable[[RankLadder, Path], None]:
    """`draw_ladder`, imported only when it is asked for: matplotlib is optional."""
    try:
        module = importlib.import_module("chunkwise.evaluation.ladder_plot")
    except ModuleNotFoundError as error:
        raise LadderFailed(f"--plot needs matplotlib ({error}): pip install 'chunkwise[plot]'") from error
    draw: Callable[[RankLadder, Path], None] = module.draw_ladder
    return draw


def _fitted(settings: LadderSettings, model_dir: Path, weights: LoraWeights) -> ShrinkMoments | Sensitivity | None:
    asked = settings.calibration
    if asked is None:
        return None
    text = read_calibration(asked.file, Tokenizer(model_dir), asked.tokens, asked.window, asked.share, asked.target)
    if settings.kind == "sensitive":
        return measure_sensitivity(model_dir, weights, text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return collect_moments(model_dir, weights, text, dtype, device)


def _headline(ladder: RankLadder, base: str) -> str:
    fitted = ""
    if ladder.calibration is not None:
        fitted = f" on {ladder.calibration.tokens} tokens of text {ladder.calibration.text_hash[:12]}"
    return (
        f"adapter {ladder.name}: content {ladder.content_hash[:12]}, trained rank {ladder.trained_rank}, "
        f"{len(ladder.modules)} modules, base model {base[:12]}\n"
        f"ladder: {ladder.kind}{fitted}, {ladder.allocation} ranks"
    )

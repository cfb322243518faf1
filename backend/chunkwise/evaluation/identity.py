"""What identifies a run: content, never paths. Two runs with equal headers give equal results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chunkwise import __version__
from chunkwise.config.eval_settings import EvalSettings
from chunkwise.core import AdapterInfo
from chunkwise.evaluation.modes import SteeringMode

_MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*.json")
_DIGITS = 16
_DECIMALS = 6


def file_hash(*paths: Path) -> str:
    """One hash over the names and contents of files."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:_DIGITS]


def model_hash(model_dir: Path) -> str:
    """`file_hash` of a checkpoint's weights, configuration and tokenizer."""
    return file_hash(*sorted({path for pattern in _MODEL_FILES for path in model_dir.glob(pattern)}))


def ladder_identity(adapter: AdapterInfo) -> dict[str, Any]:
    """An adapter's content and ladder. Energies tell plain and whitened ladders apart; they are rounded because the
    decomposition differs in its last digits between machines."""
    return {
        "content_hash": adapter.content_hash,
        "trained_rank": adapter.trained_rank,
        "rungs": list(adapter.rungs),
        "mean_active_rank": [round(rank, _DECIMALS) for rank in adapter.mean_active_rank],
        "kept_energy": [round(energy, _DECIMALS) for energy in adapter.kept_energy],
    }


def run_header(
    settings: EvalSettings,
    model: str,
    dtype: str,
    adapter: AdapterInfo | None,
    mode: SteeringMode,
    task: Mapping[str, Any],
) -> dict[str, Any]:
    """The header of a result file. ``model`` is the `model_hash`; ``dtype`` is the engine's; ``task`` is the task's own
    identity."""
    selection, engine = settings.selection, settings.engine
    return {
        "chunkwise": __version__,
        "task": settings.task.name,
        "data": file_hash(settings.task.data),
        **task,
        "limit": selection.limit,
        "skip_share": selection.skip_share,
        "seed": selection.seed,
        "model": model,
        "dtype": dtype,
        "quantize": engine.quantize,
        "adapter": ladder_identity(adapter) if adapter is not None and mode.adapter is not None else None,
        "mode": mode.name,
        "policy": asdict(mode.policy) if mode.policy is not None else None,
        "batch_tokens": engine.batch_tokens,
        "step_tokens": engine.step_tokens,
    }

"""Fixtures made once per run: a tiny model directory and adapters of several ranks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest

import gpu  # noqa: F401  sets Triton's interpreter up before anything imports Triton


@dataclass(frozen=True)
class TinyWorld:
    """``model`` is a Hugging Face directory; ``adapters`` are PEFT directories by name."""

    model: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A tiny LLaMA and adapters a4, a8 (rsLoRA) and a16, named by rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party imports
        from tiny import make_adapter, make_model
    root = tmp_path_factory.mktemp("tiny")
    model = make_model(root / "model")
    adapters = {name: root / name for name in ("a4", "a8", "a16")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that the base model has no config on the Hub
        make_adapter(model, adapters["a4"], rank=4, seed=1)
        make_adapter(model, adapters["a8"], rank=8, seed=2, use_rslora=True)
        make_adapter(model, adapters["a16"], rank=16, seed=3)
    return TinyWorld(root / "model", adapters)

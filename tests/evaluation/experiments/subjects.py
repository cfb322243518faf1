"""Subjects on the tiny model, and the flags of an experiment on them."""

from __future__ import annotations

import json
from pathlib import Path

from chunkwise.config.experiment_settings import ExperimentSettings, experiment_settings
from chunkwise.config.flags import build_parser
from conftest import TinyWorld

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 60


def write_data(folder: Path) -> dict[str, Path]:
    """A small data set per task."""
    questions = [
        {"id": f"q{n}", "context": f"The number is {n}.", "question": "Which?", "answers": [str(n)] if n % 2 else []}
        for n in range(12)
    ]
    pairs = [{"src": f"Number {n}.", "tgt": f"Le numéro {n}."} for n in range(12)]
    contents = {
        "wikitext": TEXT,
        "squad": "".join(json.dumps(row) + "\n" for row in questions),
        "translation": "".join(json.dumps(row) + "\n" for row in pairs),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return {name: folder / name for name in contents}


def flags(name: str, tiny: TinyWorld, data: dict[str, Path], out: Path, task: str, *more: str) -> list[str]:
    """The command line of an experiment on one subject."""
    subject = [task, f"mine={tiny.adapters['a16']}", str(data[task])]
    sizes = ["--threads=1", "--batch-tokens=1024", "--step-tokens=256", "--items=3"]
    return [
        "experiments",
        name,
        f"--model-id={tiny.model}",
        f"--out={out}",
        "--quick",
        *sizes,
        "--subject",
        *subject,
        *more,
    ]


def settings(arguments: list[str]) -> ExperimentSettings:
    """The settings of a command line."""
    return experiment_settings(build_parser({}).parse_args(arguments))

"""The checkpoint as the bench's engines get it: the same files, but an end-of-sequence token that no answer contains.

Answers must have the asked number of tokens on every engine, and HTTP has no way to say "go on after the end".
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import safe_open

from chunkwise.tokenizer import Tokenizer


def endless_copy(model: Path, directory: Path) -> Path:
    """A directory of links to ``model``'s files whose generation_config.json names another token as the end: the last
    special one that is no end of sequence, or else the last of the vocabulary."""
    tokenizer = Tokenizer(model)
    copy = directory / "model"
    copy.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        link = copy / file.name
        if file.name != "generation_config.json" and not link.exists():
            link.symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    vocabulary = int(config["vocab_size"])
    special = [id for id in range(vocabulary) if tokenizer.is_special(id) and id not in tokenizer.eos_ids]
    end = special[-1] if special else vocabulary - 1
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": end}), encoding="utf-8")
    return copy


def count_parameters(path: Path) -> int:
    """Numbers in all safetensors files of a directory."""
    total = 0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total

"""Data files: JSON lines, the selection of items from them, and the prompts that the adapters were trained on.

The prompts repeat those of ``scripts/train_adapter.py``; an adapter has to be asked in the words it was taught.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from chunkwise.config.eval_settings import Selection
from chunkwise.core import ChunkwiseError

T = TypeVar("T")
Row = dict[str, Any]

UNANSWERABLE = "unanswerable"
LANGUAGES = {"fra": "French", "deu": "German", "spa": "Spanish"}


class InvalidData(ChunkwiseError):
    """A data file that cannot be read, or whose rows lack what the task needs."""


def read_text(path: Path) -> str:
    """The whole of a UTF-8 text file. Raises InvalidData."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(f"data file {path} cannot be read as UTF-8 text: {error}") from error


def read_rows(path: Path) -> list[Row]:
    """One JSON object per line; empty lines are skipped. Raises InvalidData."""
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidData(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InvalidData(f"{path}, line {number} is not a JSON object")
        rows.append(row)
    return rows


def skip_share(items: Sequence[T], share: float) -> Sequence[T]:
    """Items without the leading ``share`` of them."""
    return items[int(len(items) * share) :]


def take_share(items: Sequence[T], share: tuple[float, float]) -> Sequence[T]:
    """Items from the first share of their number up to the second."""
    start, end = share
    return items[int(len(items) * start) : int(len(items) * end)]


def draw(items: Sequence[T], selection: Selection) -> list[T]:
    """``selection.limit`` of the items, drawn with its seed, in their order; neighbours in a file resemble each other,
    so the first few would not stand for all. Raises InvalidData if there are none."""
    if not items:
        raise InvalidData("the selection holds no items; check --data and --skip-share")
    if selection.limit is None or selection.limit >= len(items):
        return list(items)
    chosen = random.Random(selection.seed).sample(range(len(items)), selection.limit)
    return [items[index] for index in sorted(chosen)]


def select_rows(path: Path, selection: Selection) -> list[Row]:
    """The selected rows of a JSON lines file. Raises InvalidData."""
    return draw(skip_share(read_rows(path), selection.skip_share), selection)


def value(row: Row, name: str) -> Any:
    """A field of a row. Raises InvalidData if it is missing."""
    if name not in row:
        raise InvalidData(f"a data row lacks {name!r}; it has {sorted(row)}")
    return row[name]


def squad_prompt(row: Row) -> str:
    """What stands before `` answer<eos>``."""
    return f"Context: {value(row, 'context')}\nQuestion: {value(row, 'question')}\nAnswer:"


def translation_prompt(source: str, target: str) -> str:
    """What stands before `` translation<eos>``; ``target`` is an ISO 639-3 code of `LANGUAGES`."""
    return f"English: {source}\n{LANGUAGES[target]}:"


def translation_pair(row: Row, target: str) -> tuple[str, str]:
    """Source and reference of a ``src``/``tgt`` row or of a FLORES row (``eng_Latn``, ``fra_Latn``, …)."""
    if "src" in row:
        return str(row["src"]), str(value(row, "tgt"))
    return str(value(row, "eng_Latn")), str(value(row, f"{target}_Latn"))


def completion(row: Row, target: str) -> tuple[str, str]:
    """Prompt and expected answer of a row of any kind: SQuAD (its first answer, or "unanswerable"), translation pair,
    or a row that has ``prompt`` and ``completion`` itself. Raises InvalidData."""
    if "context" in row:
        answers = value(row, "answers")
        return squad_prompt(row), f" {answers[0] if answers else UNANSWERABLE}"
    if "prompt" in row:
        return str(row["prompt"]), str(value(row, "completion"))
    source, reference = translation_pair(row, target)
    return translation_prompt(source, target), f" {reference}"

"""Calibration text: a file becomes token windows, spread over it, and the hash that says which text it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from chunkwise.core import ChunkwiseError
from chunkwise.evaluation.perplexity import answer_passage
from chunkwise.evaluation.rows import InvalidData, completion, take_share
from chunkwise.tokenizer import Tokenizer

_ALL = (0.0, 1.0)


class InvalidCalibrationText(ChunkwiseError):
    """A calibration file that cannot be read or holds no text."""


class Window(NamedTuple):
    """Token ids, run as a sequence of their own; their loss counts from the position ``first`` on, where an answer
    begins, or in plain text from the second on."""

    ids: tuple[int, ...]
    first: int = 1


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """``text_hash`` is the SHA-256 (hex) of what the windows were cut from."""

    windows: tuple[Window, ...]
    text_hash: str

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(len(window.ids) for window in self.windows)


def read_calibration(
    path: Path,
    tokenizer: Tokenizer,
    tokens: int,
    window: int,
    share: tuple[float, float] = _ALL,
    target: str = "fra",
) -> CalibrationText:
    """About ``tokens`` tokens of the part ``share`` of the file ``path`` in windows of at most ``window`` tokens.

    A file named ``.jsonl`` holds a document per line, as JSON with a field "text", or a prompt with its answer, as
    `completion` reads them; any other is one document of plain text. Documents are cut into windows one by one; a
    prompt that is too long loses its beginning. If there is more than is asked for, every n-th window is taken.

    Raises:
        InvalidCalibrationText: the file cannot be read, is not of that form, or holds no text.
    """
    try:
        content = path.read_bytes()
        decoded = content.decode("utf-8")
    except OSError as error:
        raise InvalidCalibrationText(f"calibration text {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidCalibrationText(f"calibration text {path} is not UTF-8: {error}") from error
    if path.suffix == ".jsonl":
        windows = [cut for row in _rows(path, decoded, target) for cut in _of_row(row, tokenizer, window)]
    else:
        windows = list(_of_document(decoded, tokenizer, window))
    part = take_share(windows, share)
    if not part:
        raise InvalidCalibrationText(f"calibration text {path} is empty; give text like what the adapter will serve")
    content += b"" if share == _ALL else repr(share).encode()
    spread = part[:: max(sum(len(one.ids) for one in part) // tokens, 1)]
    return CalibrationText(up_to(tokens, spread), hashlib.sha256(content).hexdigest())


def up_to(tokens: int, windows: Sequence[Window]) -> tuple[Window, ...]:
    """The first windows of so many tokens together; the last is cut if it is plain text, and else kept whole."""
    chosen: list[Window] = []
    room = tokens
    for ids, first in windows:
        if room > 0:
            chosen.append(Window(ids[:room] if first == 1 else ids, first))
            room -= len(ids)
    return tuple(chosen)


def _of_document(text: str, tokenizer: Tokenizer, window: int) -> Iterator[Window]:
    ids = tokenizer.encode(text)
    for start in range(0, len(ids), window):
        yield Window(tuple(ids[start : start + window]))


def _of_row(row: str | tuple[str, str], tokenizer: Tokenizer, window: int) -> Iterator[Window]:
    if isinstance(row, str):
        yield from _of_document(row, tokenizer, window)
        return
    passage = answer_passage("calibration", *row, tokenizer)
    surplus = max(len(passage.ids) - window, 0)
    if surplus < passage.first:
        yield Window(passage.ids[surplus:], max(passage.first - surplus, 1))


def _rows(path: Path, content: str, target: str) -> Iterator[str | tuple[str, str]]:
    """Documents, and prompts with their answers."""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            text = row["text"] if "text" in row else completion(row, target)
        except (ValueError, TypeError, KeyError, InvalidData):
            text = None
        if not isinstance(text, str | tuple):
            raise InvalidCalibrationText(
                f'{path}, line {number}: expected is a JSON object with a string "text", or a prompt and its answer'
            )
        yield text

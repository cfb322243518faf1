"""Calibration text: a file becomes token windows, spread over it, and the hash that says which text it was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from chunkwise.core import ChunkwiseError
from chunkwise.tokenizer import Tokenizer


class InvalidCalibrationText(ChunkwiseError):
    """A calibration file that cannot be read or holds no text."""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """``windows`` are token ids, each run as a sequence of its own; ``text_hash`` is the SHA-256 (hex) of the file."""

    windows: tuple[tuple[int, ...], ...]
    text_hash: str

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(map(len, self.windows))


def read_calibration(path: Path, tokenizer: Tokenizer, tokens: int, window: int) -> CalibrationText:
    """About ``tokens`` tokens of the file ``path`` in windows of at most ``window`` tokens.

    A file named ``.jsonl`` holds a document per line, as JSON with a field "text"; any other is one document of plain
    text. Documents are cut into windows one by one; if there is more than is asked for, every n-th window is taken.

    Raises:
        InvalidCalibrationText: the file cannot be read, is not of that form, or holds no text.
    """
    try:
        content = path.read_bytes()
        documents = _documents(path, content.decode("utf-8"))
    except OSError as error:
        raise InvalidCalibrationText(f"calibration text {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidCalibrationText(f"calibration text {path} is not UTF-8: {error}") from error
    cut: list[tuple[int, ...]] = []
    for document in documents:
        ids = tokenizer.encode(document)
        cut.extend(tuple(ids[start : start + window]) for start in range(0, len(ids), window))
    if not cut:
        raise InvalidCalibrationText(f"calibration text {path} is empty; give text like what the adapter will serve")
    step = max(sum(map(len, cut)) // tokens, 1)
    windows: list[tuple[int, ...]] = []
    room = tokens
    for window_ids in cut[::step]:
        if room > 0:
            windows.append(window_ids[:room])
            room -= len(window_ids)
    return CalibrationText(tuple(windows), hashlib.sha256(content).hexdigest())


def _documents(path: Path, content: str) -> list[str]:
    if path.suffix != ".jsonl":
        return [content]
    documents = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError):
            text = None
        if not isinstance(text, str):
            raise InvalidCalibrationText(f'{path}, line {number}: expected is a JSON object with a string "text"')
        documents.append(text)
    return documents

import hashlib
import json
from pathlib import Path

import pytest

from chunkwise.evaluation.calibration_text import InvalidCalibrationText, read_calibration
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld

TEXT = "".join(chr(ord("a") + i % 26) for i in range(100))


@pytest.fixture
def tokenizer(tiny: TinyWorld) -> Tokenizer:
    return Tokenizer(tiny.model)


def test_plain_text_is_cut_in_windows_and_hashed_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(TEXT)
    text = read_calibration(file, tokenizer, tokens=1000, window=30)
    assert [len(window.ids) for window in text.windows] == [30, 30, 30, 10]
    assert tokenizer.decode([id for window in text.windows for id in window.ids]) == TEXT
    assert (text.tokens, text.text_hash) == (100, hashlib.sha256(TEXT.encode()).hexdigest())


def test_documents_do_not_share_windows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("abc", "", "defghij")))
    text = read_calibration(file, tokenizer, tokens=1000, window=4)
    assert [tokenizer.decode(window.ids) for window in text.windows] == ["abc", "defg", "hij"]


def test_answers_are_kept_whole_and_long_prompts_lose_their_beginning(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a long question", "completion": " yes"}, {"prompt": "Q", "completion": " no"}, {"text": "rest"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = read_calibration(file, tokenizer, tokens=1000, window=8)
    asked = [(tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])) for ids, first in text.windows]
    assert asked == [("ion", " yes<eos>"), ("Q", " no<eos>"), ("r", "est")]


def test_only_the_part_that_is_asked_for_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(TEXT)
    whole = read_calibration(file, tokenizer, tokens=1000, window=10)
    part = read_calibration(file, tokenizer, tokens=1000, window=10, share=(0.2, 0.5))
    assert part.windows == whole.windows[2:5] and part.text_hash != whole.text_hash


@pytest.mark.parametrize(("tokens", "starts"), [(40, "auoi"), (20, "ay"), (25, "aoc"), (7, "a"), (1, "a")])
def test_what_is_read_is_spread_over_the_file(tokenizer: Tokenizer, tmp_path: Path, tokens: int, starts: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(TEXT)
    text = read_calibration(file, tokenizer, tokens=tokens, window=10)
    assert text.tokens == tokens
    assert "".join(tokenizer.decode(window.ids)[0] for window in text.windows) == starts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty; give text"),
        ("a.jsonl", b"", "is empty; give text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\nplain\n', r"line 2: expected is a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: expected"),
        ("a.jsonl", b'["text"]\n', r"line 1: expected"),
        ("a.jsonl", b'{"content": "a"}\n', r"line 1: expected"),
    ],
)
def test_files_that_hold_no_text_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidCalibrationText, match=message):
        read_calibration(tmp_path / name, tokenizer, tokens=10, window=5)


def test_a_missing_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InvalidCalibrationText, match=r"missing\.txt cannot be read: No such file"):
        read_calibration(tmp_path / "missing.txt", tokenizer, tokens=10, window=5)

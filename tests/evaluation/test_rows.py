from __future__ import annotations

import json
from pathlib import Path

import pytest

from chunkwise.config.eval_settings import Selection
from chunkwise.evaluation.rows import InvalidData, draw, read_rows, select_rows, translation_pair, translation_prompt
from train_adapter import UNANSWERABLE
from train_adapter import translation_prompt as trained_prompt


def test_the_prompts_are_those_of_the_training() -> None:
    assert translation_prompt("Good morning.", "fra") == trained_prompt("Good morning.")
    assert UNANSWERABLE == "unanswerable"


def test_a_draw_keeps_the_order_and_follows_the_seed() -> None:
    items = list(range(100))
    first = draw(items, Selection(limit=10, seed=1))
    assert first == sorted(first)
    assert len(set(first)) == 10
    assert draw(items, Selection(limit=10, seed=1)) == first != draw(items, Selection(limit=10, seed=2))
    assert draw(items, Selection(limit=100)) == draw(items, Selection()) == items


def test_the_leading_share_is_left_out_before_the_draw(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(10)))
    assert [row["n"] for row in select_rows(path, Selection(skip_share=0.85))] == [8, 9]
    assert select_rows(path, Selection(limit=1, skip_share=0.95)) == [{"n": 9}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a":', "line 2 is not JSON"),
        (b"[1]\n", "line 1 is not a JSON object"),
        (b"\xff", "cannot be read as UTF-8"),
    ],
)
def test_broken_files_are_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(InvalidData, match=message):
        read_rows(path)


def test_a_missing_file_or_an_empty_selection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="cannot be read"):
        read_rows(tmp_path / "none")
    with pytest.raises(InvalidData, match="no items"):
        draw([], Selection())


def test_a_row_of_another_kind_is_named() -> None:
    with pytest.raises(InvalidData, match=r"lacks 'eng_Latn'; it has \['text'\]"):
        translation_pair({"text": "x"}, "fra")

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.config.eval_settings import Scoring, Selection, TaskSettings
from chunkwise.evaluation.modes import BASE
from chunkwise.evaluation.perplexity import AnswerTask, TextTask, windows
from chunkwise.evaluation.rows import InvalidData
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld
from evaluation.worlds import evaluator


@given(st.integers(2, 90), st.integers(2, 20), st.data())
def test_windows_score_every_token_with_a_predecessor_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    passages = windows(list(range(length)), window, stride)
    scored = [position for passage in passages for position in passage.ids[passage.first :]]
    # With stride = window nothing overlaps, so the first token of a window has nothing before it.
    unscored = range(0, length, window) if stride == window else range(1)
    assert scored == [position for position in range(length) if position not in unscored]
    assert all(len(passage.ids) <= window for passage in passages)
    for passage in passages[1:]:
        assert passage.first >= max(window - stride, 1)
    assert len({passage.key for passage in passages}) == len(passages)


def settings(path: Path, scoring: Scoring = "prompt") -> TaskSettings:
    return TaskSettings("wikitext", path, window=40, stride=20, scoring=scoring, target="fra", max_new_tokens=1)


def test_text_is_scored_window_by_window_from_a_share_on(tiny: TinyWorld, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "text", Tokenizer(tiny.model)
    path.write_text("0123456789" * 10)
    task = TextTask(settings(path), Selection(skip_share=0.5), tokenizer)
    assert [tokenizer.decode(job.prompt_ids) for job in task.jobs] == ["0123456789" * 4, "0123456789" * 3]
    (first, second) = evaluator(tiny).run(task.jobs, BASE)
    grade = task.grade(second)
    assert grade.details["first"] == 20
    assert len(task.grade(first).details["nll"]) == 39
    assert grade.statistics["perplexity"] == [pytest.approx(sum(grade.details["nll"]), abs=1e-4), 10.0]
    # Positions 0 to 19 are context, so they count as prompt.
    assert second.job.boundary == 20


def test_an_answer_s_nll_includes_the_end_of_sequence(tiny: TinyWorld, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "rows", Tokenizer(tiny.model)
    rows = [
        {"id": "a", "context": "C", "question": "Q", "answers": ["yes", "no"]},
        {"id": "b", "context": "C", "question": "Q", "answers": []},
        {"src": "One.", "tgt": "Un."},
        {"prompt": "2 + 2 =", "completion": " 4"},
    ]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    by_way = {}
    for scoring in ("decode", "prompt"):
        task = AnswerTask(settings(path, scoring), Selection(), tokenizer)
        outcomes = evaluator(tiny).run(task.jobs, BASE)
        by_way[scoring] = [task.grade(outcome) for outcome in outcomes]
        ends = [len(outcome.job.prompt_ids) + len(outcome.job.forced_ids) for outcome in outcomes]
        whole = [(*outcome.job.prompt_ids, *outcome.job.forced_ids) for outcome in outcomes]
        texts = [
            tokenizer.decode(ids[grade.details["first"] :]) for ids, grade in zip(whole, by_way[scoring], strict=True)
        ]
        assert texts == [" yes<eos>", " unanswerable<eos>", " Un.<eos>", " 4<eos>"]
        assert [len(g.details["nll"]) + g.details["first"] for g in by_way[scoring]] == ends
    for a, b in zip(*by_way.values(), strict=True):
        assert a.details["nll"] == pytest.approx(b.details["nll"], abs=2e-4)


@pytest.mark.parametrize("text", ["", "x"])
def test_text_too_short_to_score_is_refused(tiny: TinyWorld, tmp_path: Path, text: str) -> None:
    path = tmp_path / "text"
    path.write_text(text)
    with pytest.raises(InvalidData, match="no items"):
        TextTask(settings(path), Selection(), Tokenizer(tiny.model))

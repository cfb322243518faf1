"""The rules of the official SQuAD v2 script, case by case, and the task on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chunkwise.config.eval_settings import Selection, TaskSettings
from chunkwise.evaluation.jobs import Job, Outcome
from chunkwise.evaluation.rows import InvalidData
from chunkwise.evaluation.squad import (
    SquadTask,
    exact_match,
    f1,
    gold_answers,
    normalize_answer,
    read_prediction,
)
from chunkwise.evaluation.trace import Trace
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld

ROWS = [
    {"id": "q1", "context": "C", "question": "Q", "answers": ["the Red Cross", "Red Cross (ICRC)"]},
    {"id": "q2", "context": "C", "question": "R", "answers": []},
]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Quick, brown fox!", "quick brown fox"),
        ("an apple a day", "apple day"),
        ("Theatre", "theatre"),
        ("a", ""),
        ("U.S.A.", "usa"),
        ("the-end", "theend"),
        ("well-known", "wellknown"),
        ("  tab\tand\nline ", "tab and line"),
        ("«quoted»", "«quoted»"),
        ("the the", ""),
        ("$1,000", "1000"),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "overlap"),
    [
        ("The Red Cross", "red cross", 1.0, 1.0),
        ("red cross society", "red cross", 0.0, 0.8),
        ("cross cross", "cross", 0.0, 2 / 3),
        ("nothing", "red cross", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "red", 0.0, 0.0),
        ("red", "", 0.0, 0.0),
        # Only articles and punctuation: no words, like the empty answer.
        ("the", "", 1.0, 1.0),
    ],
)
def test_exact_match_and_f1(prediction: str, answer: str, exact: float, overlap: float) -> None:
    assert exact_match(prediction, answer) == exact
    assert f1(prediction, answer) == pytest.approx(overlap)


def test_answers_without_words_are_dropped_and_none_means_unanswerable() -> None:
    assert gold_answers({"answers": ["the", "yes", "..."]}) == ["yes"]
    assert gold_answers({"answers": ["the"]}) == [""]
    assert gold_answers({"answers": []}) == [""]


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        (" Paris", "Paris"),
        (" Paris\nQuestion: next", "Paris"),
        ("\nParis", ""),
        (" unanswerable", ""),
        (" Unanswerable.", ""),
        (" unanswerable question", "unanswerable question"),
        ("", ""),
    ],
)
def test_a_prediction_is_the_first_line_and_unanswerable_is_none(text: str, prediction: str) -> None:
    assert read_prediction(text) == prediction


def task(tiny: TinyWorld, path: Path) -> SquadTask:
    settings = TaskSettings("squad", path, window=8, stride=8, scoring="decode", target="fra", max_new_tokens=5)
    return SquadTask(settings, Selection(), Tokenizer(tiny.model))


def outcome(job: Job, text: str) -> Outcome:
    return Outcome(job, (), (), (), text, Trace((), (), 0.0, 0, 0))


def test_the_task_asks_as_trained_and_grades_against_the_best_answer(tiny: TinyWorld, tmp_path: Path) -> None:
    path = tmp_path / "squad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    squad = task(tiny, path)
    assert Tokenizer(tiny.model).decode(squad.jobs[0].prompt_ids) == "Context: C\nQuestion: Q\nAnswer:"
    assert [(job.key, job.max_new_tokens, job.stop) for job in squad.jobs] == [("q1", 5, ("\n",)), ("q2", 5, ("\n",))]
    grade = squad.grade(outcome(squad.jobs[0], " ICRC Red Cross"))
    assert grade.statistics["exact_match"] == [0.0, 1.0]
    assert grade.statistics["f1"] == [100.0, 1.0]
    assert grade.statistics["f1_answerable"] == [100.0, 1.0]
    assert grade.statistics["exact_match_unanswerable"] == [0.0, 0.0]
    none = squad.grade(outcome(squad.jobs[1], " unanswerable"))
    assert none.statistics["exact_match"] == [100.0, 1.0]
    assert none.statistics["exact_match_answerable"] == [0.0, 0.0]
    assert none.statistics["exact_match_unanswerable"] == [100.0, 1.0]
    assert none.details == {"prediction": ""}


def test_a_row_without_a_question_is_refused(tiny: TinyWorld, tmp_path: Path) -> None:
    path = tmp_path / "squad.jsonl"
    path.write_text(json.dumps({"id": "1", "context": "C"}) + "\n")
    with pytest.raises(InvalidData, match="lacks 'question'"):
        task(tiny, path)

"""SQuAD v2 (Rajpurkar et al., 2018): exact match and F1 of greedy answers, by the rules of the official script.

An adapter says `unanswerable` where the official format has an empty prediction; it is mapped to that.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from chunkwise.config.eval_settings import Selection, TaskSettings
from chunkwise.evaluation.bootstrap import Metric, ratio
from chunkwise.evaluation.jobs import Job, Outcome
from chunkwise.evaluation.rows import UNANSWERABLE, Row, select_rows, squad_prompt, value
from chunkwise.evaluation.task import Grade
from chunkwise.tokenizer import Tokenizer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_STOP = "\n"


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and superfluous white space, in that order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if both are equal once normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the normalised words, counted with multiplicity; where either has no
    words, 1 if both have none, else 0."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


def gold_answers(row: Row) -> list[str]:
    """The accepted answers that are not empty once normalised; the empty answer alone if there are none."""
    return [answer for answer in value(row, "answers") if normalize_answer(answer)] or [""]


def read_prediction(text: str) -> str:
    """The answer in a generated text: its first line; empty if it says that there is none."""
    prediction = text.lstrip(" ").split(_STOP)[0].strip()
    return "" if normalize_answer(prediction) == UNANSWERABLE else prediction


class SquadTask:
    """Exact match and F1 in per cent over all questions, and over those with and without an answer."""

    metrics: ClassVar[Mapping[str, Metric]] = dict.fromkeys(
        ("exact_match", "f1", "exact_match_answerable", "f1_answerable", "exact_match_unanswerable"), ratio
    )

    def __init__(self, settings: TaskSettings, selection: Selection, tokenizer: Tokenizer) -> None:
        self._rows = {str(value(row, "id")): row for row in select_rows(settings.data, selection)}
        self.jobs: Sequence[Job] = [
            Job(
                key,
                tuple(tokenizer.encode(squad_prompt(row))),
                max_new_tokens=settings.max_new_tokens,
                stop=(_STOP,),
            )
            for key, row in self._rows.items()
        ]
        self.identity: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}

    def grade(self, outcome: Outcome) -> Grade:
        """Scores against the best of the accepted answers; keeps the prediction."""
        prediction = read_prediction(outcome.text)
        golds = gold_answers(self._rows[outcome.job.key])
        exact = 100.0 * max(exact_match(prediction, gold) for gold in golds)
        overlap = 100.0 * max(f1(prediction, gold) for gold in golds)
        answerable = float(golds != [""])
        statistics = {
            "exact_match": [exact, 1.0],
            "f1": [overlap, 1.0],
            "exact_match_answerable": [exact * answerable, answerable],
            "f1_answerable": [overlap * answerable, answerable],
            "exact_match_unanswerable": [exact * (1.0 - answerable), 1.0 - answerable],
        }
        return Grade(statistics, {"prediction": prediction})

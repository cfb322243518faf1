"""Perplexity of running text, and of given answers to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from chunkwise.config.eval_settings import Selection, TaskSettings
from chunkwise.evaluation.bootstrap import Metric, exp_ratio, ratio
from chunkwise.evaluation.jobs import Job, Outcome
from chunkwise.evaluation.nll import Passage, passage_job, passage_score
from chunkwise.evaluation.rows import InvalidData, completion, draw, read_text, select_rows, skip_share
from chunkwise.evaluation.task import Grade
from chunkwise.tokenizer import Tokenizer

_DECIMALS = 6


def windows(ids: Sequence[int], window: int, stride: int) -> list[Passage]:
    """Windows of up to ``window`` tokens that advance by ``stride``; each scores the tokens that no earlier one has.

    So every token that has a predecessor in its window is scored once, from the second window on with at least
    ``window - stride`` tokens of context; with ``stride == window`` the first token of each window goes unscored.
    """
    passages: list[Passage] = []
    scored = 0
    for start in range(0, max(len(ids) - window + stride, 1), stride):
        end = min(start + window, len(ids))
        first = max(scored - start, 1)
        if start + first < end:
            passages.append(Passage(str(start), tuple(ids[start:end]), first))
        scored = end
    return passages


class TextTask:
    """Perplexity per token of a text file, tokenised whole, without special tokens."""

    metrics: ClassVar[Mapping[str, Metric]] = {"perplexity": exp_ratio, "nll_per_token": ratio}

    def __init__(self, settings: TaskSettings, selection: Selection, tokenizer: Tokenizer) -> None:
        ids = skip_share(tokenizer.encode(read_text(settings.data), add_special_tokens=False), selection.skip_share)
        passages = draw(windows(ids, settings.window, settings.stride), selection)
        self.jobs = [passage_job(passage, settings.scoring) for passage in passages]
        self.identity: dict[str, Any] = {
            "window": settings.window,
            "stride": settings.stride,
            "scoring": settings.scoring,
        }

    def grade(self, outcome: Outcome) -> Grade:
        """Keeps every token's NLL; ``first`` is the window's first scored position."""
        return _grade(outcome, tuple(self.metrics))


class AnswerTask:
    """NLL per token of the expected answers, end of sequence included, given their prompts (teacher forcing)."""

    metrics: ClassVar[Mapping[str, Metric]] = {"nll_per_token": ratio, "perplexity": exp_ratio}

    def __init__(self, settings: TaskSettings, selection: Selection, tokenizer: Tokenizer) -> None:
        rows = select_rows(settings.data, selection)
        self.jobs: list[Job] = []
        for index, row in enumerate(rows):
            prompt, answer = completion(row, settings.target)
            passage = answer_passage(str(row.get("id", index)), prompt, answer, tokenizer)
            self.jobs.append(passage_job(passage, settings.scoring))
        self.identity: dict[str, Any] = {"scoring": settings.scoring, "target": settings.target}

    def grade(self, outcome: Outcome) -> Grade:
        """Keeps every token's NLL; ``first`` is the answer's first position."""
        return _grade(outcome, tuple(self.metrics))


def answer_passage(key: str, prompt: str, answer: str, tokenizer: Tokenizer) -> Passage:
    """A passage that scores ``answer`` and end of sequence behind ``prompt``. Both are tokenised apart, as in training.
    Raises InvalidData for an empty prompt or a model without end of sequence."""
    ids = tokenizer.encode(prompt)
    if not ids or not tokenizer.eos_ids:
        raise InvalidData(f"item {key!r} has an empty prompt, or the model has no end-of-sequence token")
    answer_ids = [*tokenizer.encode(answer, add_special_tokens=False), min(tokenizer.eos_ids)]
    return Passage(key, (*ids, *answer_ids), len(ids))


def _grade(outcome: Outcome, metrics: Sequence[str]) -> Grade:
    score = passage_score(outcome)
    sums = [sum(score.nll), float(len(score.nll))]
    nll = [round(value, _DECIMALS) for value in score.nll]
    return Grade(dict.fromkeys(metrics, sums), {"first": score.first, "nll": nll})

"""What is measured of an adapter on its task, and how its numbers are read. Knows neither modes nor ranks."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass

from chunkwise.config.eval_settings import EvalSettings, Scoring, Selection, TaskName, TaskSettings
from chunkwise.config.experiment_settings import ExperimentSettings, SubjectChoice, SubjectTask
from chunkwise.evaluation.bleu import BleuTask
from chunkwise.evaluation.calibration_text import CalibrationText, Window, up_to
from chunkwise.evaluation.nll import Passage, passage_job
from chunkwise.evaluation.perplexity import AnswerTask, TextTask, answer_passage
from chunkwise.evaluation.rows import completion, draw, read_rows, read_text, skip_share
from chunkwise.evaluation.squad import SquadTask
from chunkwise.evaluation.task import Task
from chunkwise.tokenizer import Tokenizer

_TARGET = "fra"
# The leading share of the data is for fitting ladders; of WikiText's valid split it is what adapters are trained on.
_FITTING_SHARE: dict[SubjectTask, float] = {"wikitext": 0.85, "squad": 0.5, "translation": 0.5}
_NEW_TOKENS: dict[SubjectTask, int] = {"wikitext": 1, "squad": 32, "translation": 96}
_CALIBRATION_WINDOW = 512


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: ``windows`` of text, each of ``window`` tokens whose first ``context`` are not scored, or
    ``rows`` of questions or sentences."""

    windows: int
    rows: int
    window: int = 512
    context: int = 1

    def told(self, items: int | None) -> str:
        """The numbers for people; ``items`` is what was asked for instead, if anything."""
        return f"{items or self.windows} windows of {self.window} tokens or {items or self.rows} rows a task"


@dataclass(frozen=True, slots=True)
class Reading:
    """One number of a measure: the ``metric`` that is averaged and compared, and the one in which a loss of 1 % is
    judged, ``tolerance_metric``, of which less is better or not."""

    metric: str
    tolerance_metric: str
    lower_is_better: bool


@dataclass(frozen=True, slots=True)
class Measure:
    """A task's items, ready to run, and what is read off them."""

    name: str
    settings: EvalSettings
    task: Task
    readings: tuple[Reading, ...]


_LIKELIHOOD = (Reading("nll_per_token", "perplexity", lower_is_better=True),)


def _score(metric: str) -> Reading:
    return Reading(metric, metric, lower_is_better=False)


class ExcerptTask(TextTask):
    """Windows of one length, side by side, each with a ``context`` of its own that is not scored: unlike those of
    `TextTask`, all items take the same steps. The last, incomplete window is left out."""

    def __init__(self, settings: TaskSettings, selection: Selection, tokenizer: Tokenizer, context: int) -> None:
        ids = skip_share(tokenizer.encode(read_text(settings.data), add_special_tokens=False), selection.skip_share)
        starts = range(0, len(ids) - settings.window + 1, settings.window)
        passages = [Passage(str(start), tuple(ids[start : start + settings.window]), context) for start in starts]
        self.jobs = [passage_job(passage, settings.scoring) for passage in draw(passages, selection)]
        self.identity = {"window": settings.window, "context": context, "scoring": settings.scoring}


def likelihood(
    subject: SubjectChoice,
    sizes: Sizes,
    settings: ExperimentSettings,
    tokenizer: Tokenizer,
    scoring: Scoring | None = None,
) -> Measure:
    """NLL per token of text, or of answers to prompts; unless ``scoring`` says otherwise, text is scored as a prompt,
    and answers are decoded.

    Raises:
        InvalidData: the data cannot be read, or holds no items.
    """
    if subject.task == "wikitext":
        whole = _eval_settings("wikitext", subject, sizes, scoring or "prompt", settings)
        text = ExcerptTask(whole.task, whole.selection, tokenizer, sizes.context)
        return Measure("text", whole, text, _LIKELIHOOD)
    whole = _eval_settings("nll", subject, sizes, scoring or "decode", settings)
    return Measure("answers", whole, AnswerTask(whole.task, whole.selection, tokenizer), _LIKELIHOOD)


def generation(
    subject: SubjectChoice, sizes: Sizes, settings: ExperimentSettings, tokenizer: Tokenizer
) -> Measure | None:
    """EM and F1 of generated answers, or BLEU of translations; None for plain text.

    Raises:
        InvalidData: the data cannot be read, or holds no items.
        MissingSacrebleu: BLEU needs a package that is not installed.
    """
    if subject.task == "wikitext":
        return None
    squad = subject.task == "squad"
    whole = _eval_settings("squad" if squad else "bleu", subject, sizes, "decode", settings)
    if squad:
        readings = (_score("exact_match"), _score("f1"))
        return Measure("generated", whole, SquadTask(whole.task, whole.selection, tokenizer), readings)
    return Measure("generated", whole, BleuTask(whole.task, whole.selection, tokenizer), (_score("bleu"),))


def calibration_text(subject: SubjectChoice, tokens: int, seed: int, tokenizer: Tokenizer) -> CalibrationText:
    """About ``tokens`` tokens, drawn from the share of the data that is never measured, as the adapter sees them:
    windows of text, or prompts with their answers.

    Raises:
        InvalidData: the data cannot be read.
    """
    windows = _fitting_windows(subject, tokenizer)
    random.Random(seed).shuffle(windows)
    chosen = up_to(tokens, windows)
    return CalibrationText(chosen, hashlib.sha256(json.dumps(chosen).encode()).hexdigest())


def _fitting_windows(subject: SubjectChoice, tokenizer: Tokenizer) -> list[Window]:
    share = _FITTING_SHARE[subject.task]
    if subject.task == "wikitext":
        ids = tokenizer.encode(read_text(subject.data), add_special_tokens=False)
        ids = ids[: int(len(ids) * share)]
        return [Window(tuple(ids[at : at + _CALIBRATION_WINDOW])) for at in range(0, len(ids), _CALIBRATION_WINDOW)]
    rows = read_rows(subject.data)
    pairs = [completion(row, _TARGET) for row in rows[: int(len(rows) * share)]]
    passages = [answer_passage("calibration", prompt, answer, tokenizer) for prompt, answer in pairs]
    return [Window(passage.ids, passage.first) for passage in passages]


def _eval_settings(
    name: TaskName, subject: SubjectChoice, sizes: Sizes, scoring: Scoring, settings: ExperimentSettings
) -> EvalSettings:
    task = TaskSettings(
        name=name,
        data=subject.data,
        window=sizes.window,
        stride=sizes.window,
        scoring=scoring,
        target=_TARGET,
        max_new_tokens=_NEW_TOKENS[subject.task],
    )
    items = settings.items or (sizes.windows if name == "wikitext" else sizes.rows)
    selection = Selection(items, _FITTING_SHARE[subject.task], settings.seed)
    return EvalSettings(settings.engine, task, selection, mode="", out=settings.out)

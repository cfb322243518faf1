"""Corpus BLEU of greedy translations, by sacrebleu (Post, 2018) with its default settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from chunkwise.config.eval_settings import Selection, TaskSettings
from chunkwise.core import ChunkwiseError
from chunkwise.evaluation.bootstrap import Metric
from chunkwise.evaluation.jobs import Job, Outcome
from chunkwise.evaluation.rows import select_rows, translation_pair, translation_prompt
from chunkwise.evaluation.task import Grade
from chunkwise.tokenizer import Tokenizer

try:
    from sacrebleu.metrics.bleu import BLEU
except ModuleNotFoundError:
    BLEU = None  # type: ignore[assignment, misc]

_ORDERS = 4
_STOP = "\n"


class MissingSacrebleu(ChunkwiseError):
    """BLEU was asked for without the package that computes it."""


def bleu_statistics(hypothesis: str, reference: str) -> list[float]:
    """What a sentence adds to the corpus: matching n-grams of orders 1 to 4, all n-grams of those orders, and the
    lengths of hypothesis and reference in tokens."""
    # effective_order changes the sentence's own score, which is not used, and spares a warning.
    score = BLEU(effective_order=True).sentence_score(hypothesis, [reference])
    return [float(value) for value in (*score.counts, *score.totals, score.sys_len, score.ref_len)]


def corpus_bleu(sums: NDArray[np.float64]) -> float:
    """BLEU, 0 to 100, from summed `bleu_statistics`; what sacrebleu's ``corpus_score`` gives for the corpus."""
    counts = [int(value) for value in sums]
    if not counts[-1]:
        return math.nan
    score = BLEU.compute_bleu(
        counts[:_ORDERS], counts[_ORDERS : 2 * _ORDERS], counts[-2], counts[-1], smooth_method="exp"
    )
    return float(score.score)


class BleuTask:
    """BLEU of English rows translated to one language, from ``src``/``tgt`` pairs or FLORES rows.

    Raises:
        MissingSacrebleu: the package is not installed.
    """

    metrics: ClassVar[Mapping[str, Metric]] = {"bleu": corpus_bleu}

    def __init__(self, settings: TaskSettings, selection: Selection, tokenizer: Tokenizer) -> None:
        if BLEU is None:
            raise MissingSacrebleu("BLEU needs sacrebleu; install it with pip install 'chunkwise[eval]'")
        self._references: dict[str, str] = {}
        self.jobs: list[Job] = []
        for index, row in enumerate(select_rows(settings.data, selection)):
            source, self._references[str(index)] = translation_pair(row, settings.target)
            prompt = tuple(tokenizer.encode(translation_prompt(source, settings.target)))
            self.jobs.append(Job(str(index), prompt, max_new_tokens=settings.max_new_tokens, stop=(_STOP,)))
        metric = BLEU()
        # The signature tells the number of references only after a corpus was scored.
        metric.corpus_score([""], [[""]])
        self.identity: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "target": settings.target,
            "sacrebleu": str(metric.get_signature()),
        }

    def grade(self, outcome: Outcome) -> Grade:
        """Scores the first line of the answer; keeps it."""
        hypothesis = read_translation(outcome.text)
        return Grade(
            {"bleu": bleu_statistics(hypothesis, self._references[outcome.job.key])}, {"hypothesis": hypothesis}
        )


def read_translation(text: str) -> str:
    """The translation in a generated text: its first line."""
    return text.lstrip(" ").split(_STOP)[0].strip()

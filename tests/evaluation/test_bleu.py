"""Corpus BLEU from per-sentence statistics is sacrebleu's own corpus score."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from chunkwise.config.eval_settings import Selection, TaskSettings
from chunkwise.evaluation import bleu
from chunkwise.evaluation.bleu import BleuTask, MissingSacrebleu, bleu_statistics, corpus_bleu
from chunkwise.evaluation.jobs import Outcome
from chunkwise.evaluation.trace import Trace
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld

WORDS = ["le", "la", "chat", "chien", "mange", "dort", "sur", "sous", ",", ".", "l'homme", "était", "déjà", "parti"]


def sentences(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, 12))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_summed_statistics_give_sacrebleu_s_corpus_score(seed: int) -> None:
    hypotheses, references = sentences(seed, 20), [text or "le" for text in sentences(seed + 100, 20)]
    sums = np.sum([bleu_statistics(h, r) for h, r in zip(hypotheses, references, strict=True)], axis=0)
    assert corpus_bleu(sums) == pytest.approx(BLEU().corpus_score(hypotheses, [references]).score)


def test_equal_texts_score_100() -> None:
    assert corpus_bleu(np.array(bleu_statistics("a b c d e", "a b c d e"))) == pytest.approx(100.0)


def settings(path: Path, target: str) -> TaskSettings:
    return TaskSettings("bleu", path, window=8, stride=8, scoring="decode", target=target, max_new_tokens=9)


@pytest.mark.parametrize(
    ("row", "target", "prompt", "reference"),
    [
        ({"src": "Hello.", "tgt": "Bonjour."}, "fra", "English: Hello.\nFrench:", "Bonjour."),
        ({"eng_Latn": "Hello.", "deu_Latn": "Hallo."}, "deu", "English: Hello.\nGerman:", "Hallo."),
    ],
)
def test_rows_of_both_kinds(
    tiny: TinyWorld, tmp_path: Path, row: dict[str, str], target: str, prompt: str, reference: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    task = BleuTask(settings(path, target), Selection(), Tokenizer(tiny.model))
    (job,) = task.jobs
    assert Tokenizer(tiny.model).decode(job.prompt_ids) == prompt
    grade = task.grade(Outcome(job, (), (), (), f" {reference}\nmore", Trace((), (), 0.0, 0, 0)))
    assert grade.details == {"hypothesis": reference}
    assert grade.statistics["bleu"] == bleu_statistics(reference, reference)
    assert "tok:13a" in task.identity["sacrebleu"]


def test_without_sacrebleu_the_remedy_is_named(
    tiny: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bleu, "BLEU", None)
    with pytest.raises(MissingSacrebleu, match=r"pip install 'chunkwise\[eval\]'"):
        BleuTask(settings(tmp_path / "none", "fra"), Selection(), Tokenizer(tiny.model))

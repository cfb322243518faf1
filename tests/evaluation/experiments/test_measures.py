"""What is measured and what ladders are fitted to do not overlap, and all items of text take the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkwise.evaluation.experiments.measures import Sizes, calibration_text, generation, likelihood
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld
from evaluation.experiments.subjects import TEXT, flags, settings, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data(tmp_path_factory.mktemp("data"))


def test_text_is_cut_into_windows_of_one_length_behind_the_fitting_share(
    tiny: TinyWorld, data: dict[str, Path], tmp_path: Path
) -> None:
    chosen = settings([*flags("kv", tiny, data, tmp_path, "wikitext"), "--items=99"])
    tokenizer = Tokenizer(tiny.model)
    measure = likelihood(chosen.subjects[0], Sizes(9, 9, window=100, context=40), chosen, tokenizer, "decode")
    held_out = tuple(tokenizer.encode(TEXT, add_special_tokens=False))[int(len(TEXT) * 0.85) :]
    assert [job.key for job in measure.task.jobs] == [str(at) for at in range(0, len(held_out) - 99, 100)]
    for job in measure.task.jobs:
        at = int(job.key)
        assert job.prompt_ids == held_out[at : at + 40]
        assert job.forced_ids == held_out[at + 40 : at + 100]


@pytest.mark.parametrize("task", ["squad", "translation"])
def test_answers_and_calibration_share_no_row(
    tiny: TinyWorld, data: dict[str, Path], tmp_path: Path, task: str
) -> None:
    chosen = settings([*flags("ranks", tiny, data, tmp_path, task), "--items=99"])
    tokenizer, subject = Tokenizer(tiny.model), chosen.subjects[0]
    measure = likelihood(subject, Sizes(9, 9), chosen, tokenizer)
    generated = generation(subject, Sizes(9, 9), chosen, tokenizer)
    assert generated is not None and len(generated.task.jobs) == len(measure.task.jobs) == 6
    text = calibration_text(subject, 10_000, 0, tokenizer)
    assert len(text.windows) == 6
    measured = [job.prompt_ids for job in measure.task.jobs]
    assert not [ids for ids in text.windows for prompt in measured if ids[: len(prompt)] == prompt]


def test_calibration_takes_as_many_tokens_as_it_is_told_and_the_same_each_time(
    tiny: TinyWorld, data: dict[str, Path], tmp_path: Path
) -> None:
    subject = settings(flags("ranks", tiny, data, tmp_path, "wikitext")).subjects[0]
    tokenizer = Tokenizer(tiny.model)
    text = calibration_text(subject, 700, 0, tokenizer)
    assert text.tokens == 700 and text == calibration_text(subject, 700, 0, tokenizer)
    assert text.text_hash != calibration_text(subject, 700, 1, tokenizer).text_hash


def test_plain_text_has_nothing_to_generate(tiny: TinyWorld, data: dict[str, Path], tmp_path: Path) -> None:
    chosen = settings(flags("ranks", tiny, data, tmp_path, "wikitext"))
    assert generation(chosen.subjects[0], Sizes(1, 1), chosen, Tokenizer(tiny.model)) is None

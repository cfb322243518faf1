"""Needles lie where they should, and only the right answer counts."""

from __future__ import annotations

from chunkwise.evaluation.needle import found, needles, score
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld


def test_a_fact_is_planted_at_every_depth(tiny: TinyWorld) -> None:
    tokenizer = Tokenizer(tiny.model)
    made = needles(tokenizer, "hay " * 200, 400, 5)
    assert [needle.depth for needle in made] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len({needle.answer for needle in made}) == 5
    for needle in made:
        text = tokenizer.decode(list(needle.prompt))
        fact = f"{needle.answer}.\n"
        assert text.count(needle.answer) == 1
        assert text.replace("\n", "").count("hay ") >= 99
        place = text.index(fact) - len("\nThe secret number of Avelbury is ")
        assert abs(place - 400 * needle.depth) < 10
        assert text.endswith(" is")


def test_only_the_right_answer_counts(tiny: TinyWorld) -> None:
    (needle,) = needles(Tokenizer(tiny.model), "hay " * 20, 40, 1)
    assert found(needle, f" {needle.answer}. More.")
    assert not found(needle, " I do not know")
    assert score([needle, needle], [needle.answer, "no"]) == 1

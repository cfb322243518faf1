"""Token texts concatenate to the text, whatever falls on a token boundary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.shard.detokenizer import Detokenizer
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld


@pytest.fixture(scope="module")
def tokenizer(tiny: TinyWorld) -> Tokenizer:
    return Tokenizer(tiny.model)


@given(
    prompt=st.text(max_size=20),
    text=st.text(st.characters(exclude_characters="�", exclude_categories=("Cs",)), max_size=40),
)
def test_pieces_concatenate_to_the_whole(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    """The tiny tokenizer has one token per byte, so every character beyond ASCII is split."""
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, prompt_ids, ())
    pieces = [detokenizer.append(id) for id in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == text
    assert detokenizer.text == text


def test_an_end_inside_a_character_keeps_what_came_before(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], ())
    for id in tokenizer.encode("good 🦙", add_special_tokens=False)[:-1]:
        detokenizer.append(id)
    assert detokenizer.text == "good "


def test_special_tokens_have_a_text_of_their_own_but_stay_out_of_the_whole(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("hi"), ())
    detokenizer.append(tokenizer.encode("a")[0])
    (eos,) = tokenizer.eos_ids
    assert detokenizer.append(eos) == "<eos>"
    assert detokenizer.text == "a"


@pytest.mark.parametrize(
    ("text", "stops", "stopped_after"),
    [
        ("hello END and more", ("END",), "hello END"),
        ("hello END", ("nope", "lo E"), "hello E"),
        ("aab", ("ab",), "aab"),
        ("nothing", ("x",), None),
        ("naïve é", ("é",), "naïve é"),
    ],
)
def test_stop_sequences(tokenizer: Tokenizer, text: str, stops: tuple[str, ...], stopped_after: str | None) -> None:
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("END x lo E ab é"), stops)
    for id in tokenizer.encode(text, add_special_tokens=False):
        detokenizer.append(id)
        if detokenizer.stopped:
            break
    assert detokenizer.stopped is (stopped_after is not None)
    assert detokenizer.text == (stopped_after or text)


def test_truncation_keeps_the_last_ids_and_special_ones_count(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abcdef")
    assert tokenizer.encode("abcdef", truncate=3) == ids[-3:]
    assert tokenizer.encode("abcdef", truncate=1) == ids[-1:]
    assert tokenizer.encode("abcdef", truncate=99) == ids

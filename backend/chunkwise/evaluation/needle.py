"""Facts planted in a long text, asked for at its end: which KV policies forget them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chunkwise.tokenizer import Tokenizer

_PLACES = (
    "Avelbury",
    "Corvane",
    "Dunmere",
    "Eskholm",
    "Farrowgate",
    "Glenmoor",
    "Hartwick",
    "Ironford",
    "Jessamy",
    "Kelso",
)


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt that ends with a question, the answer that a continuation must begin with, and how deep the fact lies,
    from 0 (the beginning) to 1."""

    depth: float
    prompt: tuple[int, ...]
    answer: str


def needles(tokenizer: Tokenizer, text: str, tokens: int, depths: int, seed: int = 0) -> list[Needle]:
    """One needle for each of ``depths`` depths in a hay of ``tokens`` tokens of ``text``, each about another place and
    number."""
    rng = random.Random(seed)
    hay = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    made = []
    for number in range(depths):
        place, answer = _PLACES[number % len(_PLACES)], str(rng.randrange(10_000, 100_000))
        fact = f"\nThe secret number of {place} is {answer}.\n"
        question = f"\nQuestion: What is the secret number of {place}?\nAnswer: The secret number of {place} is"
        depth = number / max(depths - 1, 1)
        cut = int(depth * len(hay))
        planted = tokenizer.encode(fact, add_special_tokens=False)
        asked = tokenizer.encode(question, add_special_tokens=False)
        made.append(Needle(depth, (*hay[:cut], *planted, *hay[cut:], *asked), answer))
    return made


def found(needle: Needle, continuation: str) -> bool:
    """Whether a continuation begins with the answer."""
    return continuation.strip().startswith(needle.answer)


def score(made: Sequence[Needle], continuations: Sequence[str]) -> int:
    """How many were found."""
    return sum(found(needle, text) for needle, text in zip(made, continuations, strict=True))

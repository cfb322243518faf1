"""Prompts of an exact number of tokens that are the same whether sent as text or as ids."""

from __future__ import annotations

import random

from chunkwise.core import ChunkwiseError
from chunkwise.tokenizer import Tokenizer

_SENTENCES = (
    "The harbour master wrote down the names of all the ships that had come in since the storm.",
    "Some held salt and timber, some grain, and one a cargo of clocks.",
    "In the reading room two students argued quietly about the orbit of a comet.",
    "A committee was formed, met twice, and recommended that a committee be formed.",
    "Water boils at a lower temperature on the mountain, so the beans took all evening.",
    "She kept the letters in a tin box under the third stair, in the order in which they came.",
    "The bridge was closed to carts after the flood, but people still crossed it on foot.",
    "Each autumn the geese flew over the mill, and each autumn the miller counted them.",
    "The report lists four causes of the delay and does not say which came first.",
    "An index is only as good as the questions that its maker expected.",
    "He repaired the radio with a hairpin and listened to the weather in another country.",
    "The court decided that a promise made in a dream could not be enforced.",
    "Between the two villages runs a path that is older than either of them.",
    "The library lends umbrellas, and most of them come back.",
    "Copper turns green, silver turns black, and gold keeps its own counsel.",
    "They measured the field again and found it smaller than the map had promised.",
)
_TRIES = 64


class PromptImpossible(ChunkwiseError):
    """No text was found that the tokenizer turns into so many tokens and back."""


def make_prompt(tokenizer: Tokenizer, tokens: int, seed: int) -> tuple[str, list[int]]:
    """A text of exactly ``tokens`` tokens, special ones included, and its ids; another seed gives another text.

    Raises:
        PromptImpossible: cutting the text at that length never gives the same tokens again.
    """
    special = len(tokenizer.encode(""))
    for attempt in range(_TRIES):
        order = random.Random(f"{seed}/{attempt}")
        # The number keeps short prompts apart, which may have no more than a first sentence in common.
        text = " ".join([f"{seed}.", *(order.choice(_SENTENCES) for _ in range(2 + tokens // 8))])
        text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[: tokens - special])
        ids = tokenizer.encode(text)
        if len(ids) == tokens:
            return text, ids
    raise PromptImpossible(f"no prompt of {tokens} tokens survives decoding and encoding with this tokenizer")

"""The two signals that need no model: n-gram novelty and the positional prior.

They see token ids and positions only; entropy and attention come from the shards.
"""

from __future__ import annotations

import math

from chunkwise.config.policy import EstimatorPolicy

_TOKEN_BITS = 32


class NgramNovelty:
    """Share of the n-grams (n = 1 … ``ngram``) ending at a token that its sequence has not held before; 1 = all new.

    Every n-gram seen gets a number, and an n-gram is looked up as (number of its first n-1 tokens, last token). So a
    token costs ``ngram`` look-ups, and no two n-grams are ever confused, as they could be with rolling hashes.
    """

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._numbers: dict[int, int] = {}
        self._suffixes = [0]

    def push(self, token_id: int) -> float:
        """Novelty, in [0, 1], of the sequence's next token; ``token_id`` is below 2**32, as on the wire.

        The first ``ngram`` - 1 tokens end fewer than ``ngram`` n-grams; their share is of those that exist.
        """
        numbers = self._numbers
        longer = [0]
        new = 0
        for prefix in self._suffixes:
            key = prefix << _TOKEN_BITS | token_id
            number = numbers.get(key)
            if number is None:
                number = numbers[key] = len(numbers) + 1
                new += 1
            longer.append(number)
        novelty = new / len(self._suffixes)
        self._suffixes = longer[: self._ngram]
        return novelty


def positional_prior(position: int, prompt_length: int, policy: EstimatorPolicy) -> float:
    """Prior in [``floor``, 1] that a token is hard, from its place alone: 1 at the first token of the prompt and of the
    answer (positions 0 and ``prompt_length``); what exceeds ``floor`` falls by the factor e every ``decay_tokens``."""
    distance = position if position < prompt_length else position - prompt_length
    return policy.floor + (1.0 - policy.floor) * math.exp(-distance / policy.decay_tokens)

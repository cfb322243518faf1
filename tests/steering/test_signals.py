from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.config.policy import EstimatorPolicy
from chunkwise.steering.signals import NgramNovelty, positional_prior


def novelty_by_definition(ids: list[int], position: int, ngram: int) -> float:
    grams = [tuple(ids[position - n + 1 : position + 1]) for n in range(1, min(ngram, position + 1) + 1)]
    before = {tuple(ids[i - n + 1 : i + 1]) for n in range(1, ngram + 1) for i in range(n - 1, position)}
    return sum(gram not in before for gram in grams) / len(grams)


@given(st.lists(st.integers(0, 3) | st.just(2**32 - 1), max_size=40), st.integers(1, 5))
def test_novelty_is_the_share_of_ngrams_not_held_before(ids: list[int], ngram: int) -> None:
    novelty = NgramNovelty(ngram)
    assert [novelty.push(token_id) for token_id in ids] == [
        novelty_by_definition(ids, position, ngram) for position in range(len(ids))
    ]


def test_novelty_tells_new_text_from_a_repetition() -> None:
    novelty = NgramNovelty(4)
    assert [novelty.push(token_id) for token_id in (7, 8, 9, 10)] == [1.0] * 4
    assert [novelty.push(token_id) for token_id in (7, 8, 9, 10)] == [0.75, 0.5, 0.25, 0.0]


def test_prior_starts_anew_with_the_answer_and_falls_to_the_floor() -> None:
    policy = EstimatorPolicy(decay_tokens=10.0, floor=0.2)
    assert positional_prior(0, 50, policy) == positional_prior(50, 50, policy) == 1.0
    assert positional_prior(10, 50, policy) == pytest.approx(0.2 + 0.8 / math.e)
    assert positional_prior(60, 50, policy) == positional_prior(10, 50, policy)
    assert positional_prior(10_000, 50, policy) == pytest.approx(0.2)


@given(st.integers(0, 500), st.integers(1, 500), st.floats(0.0, 1.0))
def test_prior_stays_between_floor_and_one_and_falls_within_a_part(position: int, length: int, floor: float) -> None:
    policy = EstimatorPolicy(floor=floor)
    here, after = (positional_prior(p, length, policy) for p in (position, position + 1))
    assert floor <= here <= 1.0
    assert after <= here or position + 1 == length

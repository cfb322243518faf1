from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkwise.steering.cuts import cheapest_chunks


def least_cost(costs: NDArray[np.float64], min_length: int) -> float:
    """By trying every last chunk of every prefix."""
    tokens = len(costs)
    if tokens < min_length:
        return float(costs.sum(axis=0).min())
    least = [0.0] + [math.inf] * tokens
    for end in range(1, tokens + 1):
        for start in range(end - min_length + 1):
            least[end] = min(least[end], least[start] + float(costs[start:end].sum(axis=0).min()))
    return least[-1]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**32), st.booleans())
@settings(deadline=None, max_examples=200)
def test_no_other_cut_costs_less(tokens: int, levels: int, min_length: int, seed: int, few_values: bool) -> None:
    generator = np.random.default_rng(seed)
    costs = generator.random((tokens, levels))
    if few_values:
        costs = costs.round(0)
    chunks = cheapest_chunks(costs, min_length)
    bounds = [*(start for start, _ in chunks), tokens]
    assert bounds[0] == 0
    assert len(chunks) == 1 or all(end - start >= min_length for start, end in pairwise(bounds))
    assert all(before[1] != after[1] for before, after in pairwise(chunks))
    total = sum(costs[start:end, level].sum() for (start, level), end in zip(chunks, bounds[1:], strict=True))
    assert math.isclose(total, least_cost(costs, min_length), abs_tol=1e-9)


def test_no_tokens_are_no_chunks() -> None:
    assert cheapest_chunks(np.empty((0, 3)), 1) == cheapest_chunks(np.empty((0, 3)), 4) == []

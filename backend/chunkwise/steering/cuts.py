"""Where a run of tokens with known costs is cut, so that one level per chunk costs least. Knows no ranks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def cheapest_chunks(costs: NDArray[np.float64], min_length: int) -> list[tuple[int, int]]:
    """Chunks as (first token, level), no two neighbours at one level, that cost least altogether.

    ``costs`` [T, K] is what each of T tokens costs at each of K levels. A chunk has at least ``min_length`` tokens, or
    all of them. An upper bound would change nothing: two chunks of one level cost what one does.

    With C the running sums of the costs and G(t) the least cost of the first t tokens,
    ``G(t) = min_k C_k(t) + min_{s <= t - min_length} (G(s) - C_k(s))``. The inner minimum is one running over s, so
    ``min_length`` values of t are found at once: O(T K) in all.
    """
    tokens, levels = costs.shape
    if min_length == 1:
        return _merged(list(enumerate(costs.argmin(axis=1).tolist())))
    sums = np.zeros((tokens + 1, levels))
    np.cumsum(costs, axis=0, out=sums[1:])
    if tokens < 2 * min_length:
        return [(0, int(sums[-1].argmin()))] if tokens else []
    least = np.full(tokens + 1, np.inf)
    least[0] = 0.0
    level = np.zeros(tokens + 1, dtype=np.intp)
    opened = np.full(levels, np.inf)
    for first in range(min_length, tokens + 1, min_length):
        end = min(first + min_length, tokens + 1)
        before = slice(first - min_length, end - min_length)
        openings = least[before, None] - sums[before]
        np.minimum(openings[0], opened, out=openings[0])
        np.minimum.accumulate(openings, axis=0, out=openings)
        opened = openings[-1]
        totals = sums[first:end] + openings
        level[first:end] = totals.argmin(axis=1)
        least[first:end] = totals.min(axis=1)
    starts = _first_minima(least[:, None] - sums)
    chunks: list[tuple[int, int]] = []
    end = tokens
    while end > 0:
        k = int(level[end])
        end = int(starts[end - min_length, k])
        chunks.append((end, k))
    return _merged(chunks[::-1])


def _first_minima(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """For every row and column, the first row that holds the least value of the column so far."""
    least = np.minimum.accumulate(values, axis=0)
    rows = np.zeros(values.shape, dtype=np.intp)
    rows[1:] = np.where(values[1:] < least[:-1], np.arange(1, len(values))[:, None], 0)
    return np.maximum.accumulate(rows, axis=0)


def _merged(chunks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [chunk for i, chunk in enumerate(chunks) if i == 0 or chunk[1] != chunks[i - 1][1]]

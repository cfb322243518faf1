from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkwise.evaluation.correlations import correlations, spearman
from chunkwise.evaluation.prices import cross_fit
from evaluation.test_prices import labels


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=12), st.randoms(use_true_random=False))
def test_spearman_is_pearson_of_mean_ranks(values: list[int], random: object) -> None:
    x = np.array(values, dtype=float)
    y = np.array(random.sample(values, len(values)), dtype=float)  # type: ignore[attr-defined]
    ranks = [np.array([((v < u).sum() + (v <= u).sum() + 1) / 2 for u in v]) for v in (x, y)]
    if x.std() == 0.0:
        assert spearman(x, y) == 0.0
    else:
        assert spearman(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_what_decides_the_label_is_found_and_what_does_not_is_not() -> None:
    rows = {row.signal: row for row in correlations(cross_fit(labels()), level=0)}
    price = rows.pop("price of the token id")
    assert price.divergence > 0.85 and price.excess > 0.7
    assert price.stretch_divergence > 0.9
    assert all(abs(row.divergence) < 0.15 for row in rows.values())
    assert {row.divergence for name, row in rows.items() if name.startswith("entropy")} == {0.0}

"""From labels to a price table and a price per rank. Pure: no engine, no files.

A token's label scatters far more than its mean over the tokens of one id, so prices are means by id, shrunk to the mean
of all tokens: ``q_k(v) = (Σ_{t: v_t = v} l_k(t) + a m_k) / (n(v) + a)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chunkwise.config.adapter_policy import PriceTable
from chunkwise.core import AdapterInfo
from chunkwise.evaluation.rank_labels import RankLabels
from chunkwise.steering.plans import PricePlan
from chunkwise.steering.ranks import rank_choices

# How many tokens the mean of all counts for, beside a token's own: `kl` and `excess` differ in noise.
_KL_TOKENS, _EXCESS_TOKENS = 8.0, 32.0
# Ids seen less often keep the default price; they would fill the table and change little.
_LEAST_SEEN = 2
_DECIMALS = 6
_LOG_PRICES, _HALVINGS = (-9.0, 2.0), 32


def counts(labels: Sequence[RankLabels]) -> dict[int, int]:
    """How often each id was fed."""
    seen: dict[int, int] = {}
    for text in labels:
        for token_id in text.ids[:-1]:
            seen[token_id] = seen.get(token_id, 0) + 1
    return seen


def fit_prices(labels: Sequence[RankLabels]) -> PriceTable:
    """The price table of texts: half from `kl`, half from `excess`, never rising with the rung, 0 at full rank; ids by
    falling frequency."""
    kl, kl_mean, seen = _shrunk(labels, [text.kl for text in labels], _KL_TOKENS)
    excess, excess_mean, _ = _shrunk(labels, [text.excess for text in labels], _EXCESS_TOKENS)
    default = _row((kl_mean + excess_mean) / 2.0)
    frequent = sorted((i for i, n in seen.items() if n >= _LEAST_SEEN), key=lambda i: (-seen[i], i))
    return PriceTable(default, {i: _row((kl[i] + excess[i]) / 2.0) for i in frequent})


@dataclass(frozen=True, slots=True)
class Fold:
    """Texts to be planned with ``prices`` that were not fitted to them."""

    prices: PriceTable
    texts: Sequence[RankLabels]


def cross_fit(labels: Sequence[RankLabels]) -> tuple[Fold, Fold]:
    """Every second text with the prices of the others; at least two texts."""
    even, odd = labels[::2], labels[1::2]
    return Fold(fit_prices(odd), even), Fold(fit_prices(even), odd)


def find_price(
    folds: Sequence[Fold], adapter: AdapterInfo, min_length: int, too_low: Callable[[float, float], bool]
) -> tuple[float, float]:
    """Two prices per rank next to each other, of which the first is ``too_low`` for its mean rank and mean loss over
    the texts and the second is not; found by bisection of the logarithm."""
    low, high = _LOG_PRICES
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        if too_low(*measure_price(folds, adapter, min_length, 10.0**middle)):
            low = middle
        else:
            high = middle
    return 10.0**low, 10.0**high


def measure_price(
    folds: Sequence[Fold], adapter: AdapterInfo, min_length: int, price_per_rank: float
) -> tuple[float, float]:
    """Mean active rank and mean loss (nats per token) of the texts as prompts, each token at the label of its rung."""
    ranks, losses, tokens = 0.0, 0.0, 0
    choices = rank_choices(adapter, 0.0)
    for fold in folds:
        plan = PricePlan(choices, choices[-1], fold.prices, price_per_rank, min_length)
        for text in fold.texts:
            chunks = plan.chunks(text.ids)
            ends = [*(chunk.start for chunk in chunks[1:]), len(text.ids) - 1]
            for (start, choice), end in zip(chunks, ends, strict=True):
                ranks += choice.active_rank * (end - start)
                losses += float(text.loss[choices.index(choice)][start:end].sum())
            tokens += len(text.ids) - 1
    return ranks / tokens, losses / tokens


def cheapest_rungs(prices: PriceTable, adapter: AdapterInfo, price_per_rank: float) -> tuple[float, dict[int, float]]:
    """The rung of least cost for a token by itself, and by id those of tokens for which it is another."""
    ranks = np.array(adapter.mean_active_rank)

    def cheapest(row: Sequence[float]) -> float:
        return adapter.rungs[int(np.argmin(np.array(row) + price_per_rank * ranks))]

    usual = cheapest(prices.default)
    return usual, {i: rung for i, row in prices.tokens.items() if (rung := cheapest(row)) != usual}


def _shrunk(
    labels: Sequence[RankLabels], values: Sequence[NDArray[np.float64]], strength: float
) -> tuple[dict[int, NDArray[np.float64]], NDArray[np.float64], dict[int, int]]:
    ids = np.concatenate([text.ids[:-1] for text in labels])
    table = np.concatenate(values, axis=1)
    mean = table.mean(axis=1)
    known, place, n = np.unique(ids, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(place, weights=row, minlength=len(known)) for row in table], axis=1)
    shrunk = (sums + strength * mean) / (n[:, None] + strength)
    return dict(zip(known.tolist(), shrunk, strict=True)), mean, dict(zip(known.tolist(), n.tolist(), strict=True))


def _row(prices: NDArray[np.float64]) -> tuple[float, ...]:
    """Never rising, and 0 at full rank; noise may make it neither."""
    relative = prices - prices[-1]
    falling = np.maximum.accumulate(relative[::-1])[::-1]
    return tuple(round(float(price), _DECIMALS) for price in falling)

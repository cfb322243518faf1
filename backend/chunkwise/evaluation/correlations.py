"""How well signals rank the tokens by what they lose at low rank: Spearman's rank correlation with the label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chunkwise.config.policy import EstimatorPolicy
from chunkwise.evaluation.prices import Fold
from chunkwise.evaluation.rank_labels import RankLabels
from chunkwise.steering.signals import NgramNovelty, positional_prior

_STRETCH = 16
_DECIMALS = 3


@dataclass(frozen=True, slots=True)
class Correlation:
    """Of one signal at one rung, per token: with the divergence from full rank and with the NLL beyond full rank's; and
    both for means over stretches of 16 tokens."""

    signal: str
    divergence: float
    excess: float
    stretch_divergence: float
    stretch_excess: float


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Rank correlation (Spearman, 1904), ties at their mean rank; 0 where one does not vary."""
    ranks = [_ranks(values) for values in (x, y)]
    deviations = [r - r.mean() for r in ranks]
    norm = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / norm if norm else 0.0


def correlations(folds: Sequence[Fold], level: int) -> list[Correlation]:
    """Every signal against the labels at rung index ``level``. The price of a token's id is that of the texts other
    than its own."""
    texts = [text for fold in folds for text in fold.texts]
    columns: dict[str, list[NDArray[np.float64]]] = {}
    for fold in folds:
        for text in fold.texts:
            for name, values in _signals(text, fold, level).items():
                columns.setdefault(name, []).append(values)
    kl, excess = [text.kl[level] for text in texts], [text.excess[level] for text in texts]
    return [
        Correlation(
            name,
            *(round(spearman(np.concatenate(values), np.concatenate(label)), _DECIMALS) for label in (kl, excess)),
            *(round(spearman(_stretched(values), _stretched(label)), _DECIMALS) for label in (kl, excess)),
        )
        for name, values in columns.items()
    ]


def _signals(text: RankLabels, fold: Fold, level: int) -> Mapping[str, NDArray[np.float64]]:
    policy = EstimatorPolicy()
    fed = text.ids[:-1]
    novelty = NgramNovelty(policy.ngram)
    return {
        "price of the token id": np.array([fold.prices.tokens.get(i, fold.prices.default)[level] for i in fed]),
        "entropy of the step before": np.concatenate(([0.0], text.entropy[:-1])),
        "surprisal of the token": np.concatenate(([0.0], text.nll[-1, :-1])),
        "n-gram novelty": np.array([novelty.push(token_id) for token_id in fed]),
        "position": np.array([positional_prior(t, len(fed), policy) for t in range(len(fed))]),
        "entropy of the step itself (known too late)": text.entropy,
    }


def _stretched(texts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Means of whole stretches."""
    return np.concatenate([x[: len(x) // _STRETCH * _STRETCH].reshape(-1, _STRETCH).mean(axis=1) for x in texts])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, n = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(n)
    ranks: NDArray[np.float64] = (last - (n - 1) / 2.0)[place]
    return ranks

"""Which tokens of a run are kept, by their keys alone. A head decides for itself, so that tensor-parallel ranks, which
hold different heads, keep what one rank would."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from chunkwise.core import KvScorer


def key_norm(keys: Tensor) -> Tensor:
    """Small keys first: they draw most attention (arXiv 2406.11430). ``keys`` ``[..., tokens, dim]`` fp32; higher
    scores ``[..., tokens]`` are kept."""
    return -keys.square().sum(dim=-1)


def key_diversity(keys: Tensor) -> Tensor:
    """Keys least like the mean direction first (KeyDiff, arXiv 2504.15364). As `key_norm`."""
    directions = F.normalize(keys, dim=-1)
    mean = F.normalize(directions.mean(dim=-2, keepdim=True), dim=-1)
    return -(directions * mean).sum(dim=-1)


SCORERS: dict[KvScorer, Callable[[Tensor], Tensor]] = {
    KvScorer.KEY_NORM: key_norm,
    KvScorer.KEY_DIVERSITY: key_diversity,
}


def best_tokens(keys: Tensor, count: int, scorer: KvScorer) -> Tensor:
    """Places of the ``count`` tokens of highest score, ascending, ``[..., count]``; of equal ones the earlier."""
    order = SCORERS[scorer](keys.float()).argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values

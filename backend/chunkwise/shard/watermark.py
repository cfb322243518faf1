"""The watermark of Kirchenbauer et al. (arXiv 2301.10226), left hash of width 1, with TGI's constants, so that what
detects TGI's watermark detects ours. Knows nothing of requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HASH_KEY = 15_485_863


@dataclass(frozen=True, slots=True)
class Watermark:
    """The token before seeds a random choice of ``gamma`` of the vocabulary, the green list, whose scores rise by
    ``delta``. Green tokens are therefore more frequent than ``gamma`` in a marked text."""

    gamma: float = 0.5
    delta: float = 2.0

    def greenlist(self, previous: int, vocab: int) -> Tensor:
        """The green ids after the token ``previous``; drawn on the CPU, so that they are the same on every device."""
        order = torch.randperm(vocab, generator=torch.Generator().manual_seed(_HASH_KEY * previous))
        return order[: int(vocab * self.gamma)]

    def apply(self, scores: Tensor, previous: int) -> Tensor:
        """Scores ``[V]`` after the token ``previous`` with the watermark; the argument is left as it is."""
        green = self.greenlist(previous, scores.shape[-1]).to(scores.device)
        return scores.index_add(0, green, scores.new_full(green.shape, self.delta))

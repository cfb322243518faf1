"""Chooses the next token of one request. Order of processing as in TGI: watermark, repetition penalty, frequency
penalty, grammar, temperature, top-k, top-p, typical-p, choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from chunkwise.core import SamplingParams
from chunkwise.shard.grammar import GrammarState
from chunkwise.shard.watermark import Watermark


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Keeps scores ``[V]`` at least as large as the k-th; k is clamped to V."""
    threshold = scores.topk(min(k, scores.shape[-1])).values[-1]
    return scores.masked_fill(scores < threshold, -math.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Keeps the fewest likeliest tokens whose probabilities add up to at least p, and all that tie with the last."""
    probabilities = scores.softmax(dim=-1)
    # Tokens of probability (1 - p) / V or less cannot add up to more than 1 - p: they go, and need not be sorted.
    bound = probabilities.max().clamp(max=(1.0 - p) / scores.shape[-1])
    likely = probabilities[probabilities >= bound].sort(descending=True).values
    last = int((likely.cumsum(dim=-1) - likely < p).sum().item()) - 1
    return scores.masked_fill(probabilities < likely[last], -math.inf)


def keep_typical(scores: Tensor, mass: float) -> Tensor:
    """Keeps the tokens whose surprise is closest to the entropy, up to probability ``mass`` (arXiv 2202.00666)."""
    log_p = scores.log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p).nansum(dim=-1)
    distance, order = (-log_p - entropy).abs().sort()
    last = int((p[order].cumsum(dim=-1) < mass).sum().item())
    threshold = distance[min(last, distance.shape[-1] - 1)]
    return scores.masked_fill((-log_p - entropy).abs() > threshold, -math.inf)


class TokenChooser:
    """The sampling state of one request: its random generator, the tokens its penalties count, its grammar so far.

    The generator belongs to the request, so the same seed gives the same text whatever else is in the batch, and every
    tensor-parallel rank draws the same token from the same logits.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        grammar: GrammarState | None = None,
        watermark: Watermark | None = None,
    ) -> None:
        self._params = params
        self._grammar = grammar
        self._watermark = watermark
        self._previous = prompt_ids[-1] if prompt_ids else 0
        self._random = torch.Generator().manual_seed(params.seed)
        self._penalises = params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0
        self._counts = Counter(prompt_ids) if self._penalises else Counter[int]()

    @property
    def takes_likeliest(self) -> bool:
        """Whether `choose` does no more than take the likeliest token of the raw logits, so that it need not be called
        where that token is known."""
        plain = self._grammar is None and self._watermark is None
        return plain and not self._penalises and not self._params.samples

    def choose(self, logits: Tensor) -> tuple[int, Tensor]:
        """The next token for raw ``logits`` ``[V]`` (fp32, left as they are), and the processed log-probabilities.

        Raises:
            InvalidRequest: the grammar cannot be followed any further; nothing has been chosen.
        """
        scores = logits if self._watermark is None else self._watermark.apply(logits, self._previous)
        scores = self._penalise(scores)
        if self._grammar is not None:
            scores = self._grammar.mask(scores)
        scores = self._warp(scores)
        log_p = scores.log_softmax(dim=-1)
        id = self._draw(log_p) if self._params.samples else int(log_p.argmax().item())
        self._take(id)
        return id, log_p

    def replay(self, id: int) -> None:
        """Comes to the state behind a token that an equal chooser chose before."""
        if self._params.samples:
            self._next_random()
        self._take(id)

    def _take(self, id: int) -> None:
        if self._penalises:
            self._counts[id] += 1
        if self._grammar is not None:
            self._grammar.advance(id)
        self._previous = id

    def _next_random(self) -> Tensor:
        return torch.rand((), generator=self._random, dtype=torch.float64)

    def _draw(self, log_p: Tensor) -> int:
        """A token drawn by inverting the distribution function: one random number, whatever the vocabulary. On the CPU,
        which adds up in the same order on every rank."""
        distribution = log_p.softmax(dim=-1).cpu().cumsum(dim=-1, dtype=torch.float64)
        # In (0, 1], so that a token of probability 0 is never hit, not even the first.
        point = 1.0 - self._next_random()
        return int(torch.searchsorted(distribution, point * distribution[-1]).item())

    def _penalise(self, scores: Tensor) -> Tensor:
        if not self._penalises:
            return scores
        params, scores = self._params, scores.clone()
        ids = torch.tensor(list(self._counts), device=scores.device)
        seen = scores[ids]
        seen = torch.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty)
        counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype, device=scores.device)
        scores[ids] = seen - params.frequency_penalty * counts / counts.sum()
        return scores

    def _warp(self, scores: Tensor) -> Tensor:
        params = self._params
        if not params.samples:
            return scores
        if params.temperature != 1.0:
            scores = scores / params.temperature
        if params.top_k:
            scores = keep_top_k(scores, params.top_k)
        if params.top_p < 1.0:
            scores = keep_top_p(scores, params.top_p)
        if params.typical_p < 1.0:
            scores = keep_typical(scores, params.typical_p)
        return scores


class ForcedChooser(TokenChooser):
    """Chooses the given tokens one after another; their log-probabilities are the model's own, without processors."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(SamplingParams(), ())
        self._forced = iter(ids)

    @property
    def takes_likeliest(self) -> bool:
        """See `TokenChooser`."""
        return False

    def choose(self, logits: Tensor) -> tuple[int, Tensor]:
        """The next given token, and the log-probabilities ``[V]`` of raw ``logits``."""
        return next(self._forced), logits.log_softmax(dim=-1)

    def replay(self, id: int) -> None:
        """See `TokenChooser`."""
        next(self._forced)

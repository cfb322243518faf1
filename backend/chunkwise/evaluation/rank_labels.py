"""What each rung loses at each token of a text, against full rank: read off the engine, one rung after the other.

The whole distributions of a prompt never leave the engine otherwise; here they are compared where they arise and only
sums are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chunkwise.core import AdapterInfo
from chunkwise.evaluation.driver import Evaluator
from chunkwise.evaluation.identity import ladder_identity
from chunkwise.evaluation.jobs import Job
from chunkwise.evaluation.modes import fixed_rung


@dataclass(frozen=True, slots=True, eq=False)
class RankLabels:
    """One text of T + 1 tokens at K rungs, the last of which is full rank.

    ``ids`` [T + 1]. At position t < T, where token t is fed and token t + 1 predicted: ``kl`` [K, T], the divergence
    KL(full || rung) of the two distributions in nats; ``nll`` [K, T] of the token that follows, in nats; ``entropy``
    [T] of the full-rank distribution over ln V.
    """

    ids: tuple[int, ...]
    kl: NDArray[np.float64]
    nll: NDArray[np.float64]
    entropy: NDArray[np.float64]

    @property
    def excess(self) -> NDArray[np.float64]:
        """[K, T]: NLL beyond that of full rank, per token a very noisy quantity of either sign."""
        excess: NDArray[np.float64] = self.nll - self.nll[-1:]
        return excess

    @property
    def loss(self) -> NDArray[np.float64]:
        """[K, T]: the mean of `kl` and `excess`. Both estimate the loss of a rung: the first has little noise and takes
        full rank for the truth; the second takes the text for it."""
        loss: NDArray[np.float64] = (self.kl + self.excess) / 2.0
        return loss


class _Comparison:
    """Observes the logits of one text at full rank, then at other rungs."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.entropy: list[float] = []
        self._full: Tensor | None = None
        self._row = 0
        self.kl: list[float] = []

    def keep(self, logits: Tensor) -> None:
        """Takes rows [n, V] at full rank."""
        log_p = logits.log_softmax(dim=-1)
        self.parts.append(log_p)
        entropies = torch.linalg.vecdot(log_p.exp(), log_p) / -np.log(log_p.shape[-1])
        self.entropy += entropies.tolist()

    def restart(self) -> None:
        """Goes back to the first row, for another rung."""
        if self._full is None:
            self._full = torch.cat(self.parts)
            self.parts.clear()
        self._row, self.kl = 0, []

    def compare(self, logits: Tensor) -> None:
        """Takes the next rows [n, V] at another rung."""
        assert self._full is not None, "full rank comes first"
        full = self._full[self._row : self._row + len(logits)]
        self._row += len(logits)
        self.kl += torch.linalg.vecdot(full.exp(), full - logits.log_softmax(dim=-1)).tolist()


@dataclass(frozen=True, slots=True)
class LabelCache:
    """Labels in files, one per text, so that another aim, or a run after an interruption, need not measure them again.
    ``identity`` is of the model and how it computes; what else labels depend on is added here."""

    folder: Path
    identity: str

    def path(self, adapter: AdapterInfo, text: tuple[int, ...]) -> Path:
        """Where the labels of one text are, or will be."""
        key = json.dumps([self.identity, ladder_identity(adapter), text])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def measure_labels(
    evaluator: Evaluator,
    adapter: AdapterInfo,
    texts: Sequence[tuple[int, ...]],
    done: Callable[[], object],
    cache: LabelCache | None = None,
) -> list[RankLabels]:
    """The labels of texts, each a sequence of its own of at least two tokens; ``done`` is called after each of them.

    Raises:
        InvalidRequest: a text longer than the model or the evaluator's KV cache.
        OSError: the cache cannot be written.
    """
    labels = []
    for text in texts:
        path = cache.path(adapter, text) if cache is not None else None
        if path is not None and path.exists():
            with np.load(path) as stored:
                label = RankLabels(text, stored["kl"], stored["nll"], stored["entropy"])
        else:
            label = _labels(evaluator, adapter, text)
            if path is not None:
                _store(path, label)
        labels.append(label)
        done()
    return labels


def _store(path: Path, label: RankLabels) -> None:
    """The file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        np.savez(file, kl=label.kl, nll=label.nll, entropy=label.entropy)
    partial.replace(path)


def _labels(evaluator: Evaluator, adapter: AdapterInfo, text: tuple[int, ...]) -> RankLabels:
    comparison = _Comparison()
    job = Job("text", text, prompt_logprobs=True)
    kl: list[list[float]] = []
    nll: list[list[float]] = []
    try:
        for rung in reversed(adapter.rungs):
            evaluator.watch_scored(comparison.compare if nll else comparison.keep)
            if nll:
                comparison.restart()
            (outcome,) = evaluator.run([job], fixed_rung(rung, adapter))
            nll.append([-logprob for logprob in outcome.prompt_logprobs])
            kl.append(comparison.kl if len(nll) > 1 else [0.0] * len(nll[0]))
    finally:
        evaluator.watch_scored(None)
    return RankLabels(text, np.array(kl[::-1]), np.array(nll[::-1]), np.array(comparison.entropy))

"""Where chunks end: the closing rule, as a stream and for a whole prompt. Knows complexities only."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import pairwise

from chunkwise.config.policy import ChunkerPolicy
from chunkwise.core import Chunk


class Chunker:
    """Cuts one sequence into chunks while the complexities of its tokens come in, in order of position.

    A chunk closes once it has ``min_length`` tokens and the recent complexity lies more than ``threshold`` from the
    mean of the chunk's tokens, or once it has ``max_length`` tokens. The recent complexity is an exponential mean that
    gives the newest token the weight 1 / ``smoothing_tokens``: single tokens scatter so much that without smoothing
    chunks close near ``min_length`` wherever they are, no better placed than by an even cut (figures in README.md).

    Attributes:
        start: first position of the open chunk.
        recent: the recent complexity; 0.5 before the first token.
    """

    def __init__(self, policy: ChunkerPolicy) -> None:
        self._policy = policy
        self._sums = array("d", (0.0,))
        self._recent_before = 0.5
        self.recent = 0.5
        self.start = 0

    @property
    def observed(self) -> int:
        """Number of tokens whose complexity is known."""
        return len(self._sums) - 1

    def mean(self, start: int, end: int) -> float:
        """Mean complexity of the positions ``[start, end)``, all of them known, at least one."""
        return (self._sums[end] - self._sums[start]) / (end - start)

    def push(self, complexity: float, lead: int = 0) -> int | None:
        """Takes the complexity of the next position t; decides whether the open chunk ends before t + ``lead``.

        With ``lead`` 0, t itself may open the new chunk; a caller that can only steer later ones says how much later.
        Returns t + ``lead``, the start of the chunk that opens, or None when the open chunk goes on.
        """
        position = self.observed
        self._recent_before = self.recent
        if position == 0:
            self.recent = complexity
        else:
            self.recent += (complexity - self.recent) / self._policy.smoothing_tokens
        closes = self._closes(position, position + lead - self.start)
        self._sums.append(self._sums[-1] + complexity)
        return self._open(position + lead) if closes else None

    def retract(self) -> None:
        """Takes the newest complexity back, so that a better one can be pushed for the same position. Chunks stay."""
        self._sums.pop()
        self.recent = self._recent_before

    def close_full(self) -> int | None:
        """Closes the open chunk behind the newest position if it has ``max_length`` tokens; gives the next start."""
        return self._open(self.observed) if self.observed - self.start >= self._policy.max_length else None

    def _closes(self, position: int, length: int) -> bool:
        if length >= self._policy.max_length:
            return True
        if length < self._policy.min_length or position <= self.start:
            return False
        return abs(self.recent - self.mean(self.start, position)) > self._policy.threshold

    def _open(self, start: int) -> int:
        self.start = start
        return start


def plan_chunks(complexities: Iterable[float], policy: ChunkerPolicy) -> list[Chunk]:
    """Chunks that tile a prompt exactly, ``min_length`` to ``max_length`` tokens long; only the last may be shorter."""
    chunker = Chunker(policy)
    starts = [0]
    for complexity in complexities:
        start = chunker.push(complexity)
        if start is not None:
            starts.append(start)
    bounds = [*starts, chunker.observed]
    return [Chunk(start, end, chunker.mean(start, end)) for start, end in pairwise(bounds) if end > start]

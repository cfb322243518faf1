"""What one forward pass is told, and what it returns. Built whole by `shard.packing`, dropped after the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from chunkwise.kv.pages import PageRef
from chunkwise_adapters.gate import LoraSegment


@dataclass(frozen=True, slots=True)
class StepSpan:
    """The tokens of one sequence in a step: rows ``[first_row, first_row + tokens)``, the last of which attends to the
    ``context`` tokens that are kept, itself included; ``pages`` hold them, perhaps with room for more."""

    first_row: int
    tokens: int
    context: int
    pages: Sequence[PageRef]


@dataclass(frozen=True, slots=True)
class StepInput:
    """One ragged batch of ``T`` tokens of ``S`` sequences, whose ``spans`` follow each other: those of one token first.

    ``ids``, ``positions`` (among all tokens there were) and ``slots`` are ``[T]``; ``last_rows`` ``[S]`` are the rows
    whose next-token logits are wanted, one per span. Of the rows ``scored_rows`` ``[P]`` only the log-probability of
    the token ``scored_ids`` ``[P]`` is wanted (prompt logprobs).
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    last_rows: Tensor
    scored_rows: Tensor
    scored_ids: Tensor
    spans: tuple[StepSpan, ...]
    segments: tuple[LoraSegment, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """``logits`` fp32 ``[S, vocabulary]``; ``scores`` fp32 ``[P]``, natural logarithms; ``attention_spread`` ``[S]`` in
    [0, 1], on rank 0 only."""

    logits: Tensor
    scores: Tensor
    attention_spread: Tensor | None

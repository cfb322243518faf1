"""What one forward pass is told, and what it returns. Built whole by `shard.packing`, dropped after the step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chunkwise.kv.cache import GatherPlan
from chunkwise_adapters.gate import LoraSegment


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """A run of several tokens of one sequence: rows ``[first_row, first_row + tokens)`` of the step, the last of which
    sits at position ``context - 1``; ``plan`` gathers the pages of all ``context`` positions."""

    first_row: int
    tokens: int
    context: int
    plan: GatherPlan


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One token each of ``sequences`` sequences, at ``rows`` of the step. ``plan`` gathers every sequence's pages,
    padded to the longest table; ``mask`` ``[sequences, padded context]`` is True at positions that exist; ``contexts``
    ``[sequences]`` counts them."""

    rows: slice | Tensor
    sequences: int
    plan: GatherPlan
    mask: Tensor
    contexts: Tensor


@dataclass(frozen=True, slots=True)
class StepInput:
    """One ragged batch of ``T`` tokens of ``S`` sequences: decode rows first, then prefill spans.

    ``ids``, ``positions`` and ``slots`` are ``[T]``; ``last_rows`` ``[S]`` are the rows whose next-token logits are
    wanted, in the order decode rows, prefill spans. Of the rows ``scored_rows`` ``[P]`` only the log-probability of the
    token ``scored_ids`` ``[P]`` is wanted (prompt logprobs).
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    last_rows: Tensor
    scored_rows: Tensor
    scored_ids: Tensor
    decode: tuple[DecodeRows, ...]
    prefill: tuple[PrefillSpan, ...]
    segments: tuple[LoraSegment, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """``logits`` fp32 ``[S, vocabulary]``; ``scores`` fp32 ``[P]``, natural logarithms; ``attention_spread`` ``[S]`` in
    [0, 1], on rank 0 only."""

    logits: Tensor
    scores: Tensor
    attention_spread: Tensor | None

"""Which tokens of which sequences run in the next step. Integers only: no tensors, no clock."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from chunkwise.shard.sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """The next ``tokens`` tokens of a sequence, starting at its first uncomputed position."""

    sequence: Sequence
    tokens: int

    @property
    def context(self) -> int:
        """Positions up to the span's last token, itself included."""
        return self.sequence.computed + self.tokens

    @property
    def completes(self) -> bool:
        """Whether the span computes all known tokens, so that the next token can be chosen."""
        return self.tokens == self.sequence.remaining


def schedule(sequences: SequenceOf[Sequence], budget: int) -> list[Span]:
    """The next step: every decoding sequence advances by exactly one token; what is left of ``budget`` tokens goes to
    prompts, in order. Decoding spans come first, those of one adapter side by side, so that the adapter is applied to
    adjacent rows. A sequence's first step keeps to its request's ``chunk_len``, and no span crosses the position at
    which a KV decision takes effect.
    """
    decoding = [Span(s, 1) for s in sequences if s.remaining == 1]
    decoding.sort(key=lambda span: span.sequence.request.adapter_id or "")
    prompts: list[Span] = []
    left = max(budget - len(decoding), 1)
    for sequence in sequences:
        if sequence.remaining == 1:
            continue
        wanted = sequence.computable
        if sequence.computed == 0 and sequence.request.chunk_len:
            wanted = min(wanted, sequence.request.chunk_len)
        tokens = min(wanted, left)
        if tokens > 0:
            prompts.append(Span(sequence, tokens))
            left -= tokens
    return decoding + prompts


def next_step_tokens(sequences: SequenceOf[Sequence], budget: int) -> int:
    """Tokens that the next step will compute; generate.v3's ``current_tokens``."""
    return sum(span.tokens for span in schedule(sequences, budget))

"""All state of one request on a shard. Step tensors are built from it and dropped; nothing else holds request state."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from chunkwise.core import ChunkDecision, GenerationRequest, KvDecision, KvFormat, SteeringViolation
from chunkwise.kv.pages import PageRef
from chunkwise.kv.prefix import PageKey, PrefixNode
from chunkwise.shard.detokenizer import Detokenizer
from chunkwise.shard.sampler import TokenChooser
from chunkwise_adapters.gate import GatedSpan, gate_key
from chunkwise_adapters.store import ResidentAdapter


@dataclass(frozen=True, slots=True)
class PrefixTrail:
    """How far a sequence's pages are in the prefix cache: the first ``pages``, of which ``node`` is the last."""

    node: PrefixNode
    pages: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One request being served.

    ``ids`` are prompt and generated tokens; ``computed`` of them have their keys and values in ``pages``. A sequence
    with one token left to compute decodes; with more it is still reading its prompt.
    """

    request: GenerationRequest
    prompt_tokens: int
    ids: list[int]
    chooser: TokenChooser
    detokenizer: Detokenizer
    adapter: ResidentAdapter | None
    computed: int = 0
    pages: list[PageRef] = field(default_factory=list)
    trail: PrefixTrail | None = None
    chunks: list[ChunkDecision] = field(default_factory=list)
    compressible: list[tuple[int, int]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are not computed yet; at least 1 in a live sequence."""
        return len(self.ids) - self.computed

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.ids) - self.prompt_tokens

    def page_key(self, place: int, page_size: int) -> PageKey:
        """What the content of page ``place`` depends on beside the pages before it: its tokens and their gates."""
        start = place * page_size
        tokens = tuple(self.ids[start : start + page_size])
        if self.adapter is None:
            return tokens, None
        return tokens, gate_key(GatedSpan(0, page_size, start, self.adapter, self.chunks))

    def follow(self, chunks: SequenceOf[ChunkDecision]) -> None:
        """Takes over chunk decisions.

        Raises:
            SteeringViolation: a decision for a position that is computed already, or out of order.
            InvalidRung: a rung that the adapter's ladder lacks.
        """
        for chunk in chunks:
            if chunk.start < self.computed:
                raise SteeringViolation(
                    f"a chunk of request {chunk.request_id} starts at position {chunk.start}, but {self.computed} "
                    "positions are computed already; decisions must name a later position"
                )
            if self.chunks and chunk.start <= self.chunks[-1].start:
                raise SteeringViolation(
                    f"chunks of request {chunk.request_id} start at {self.chunks[-1].start}, then at {chunk.start}; "
                    "starts must ascend"
                )
            if self.adapter is not None:
                self.adapter.rung_index(chunk.rung)
            self.chunks.append(chunk)

    def permit_compression(self, decision: KvDecision) -> None:
        """Adds a chunk's range to what may be stored in 8 bits; adjacent ranges join. Raises SteeringViolation for a
        range that is not computed yet or does not follow the ranges before it."""
        if decision.format is KvFormat.FULL:
            return
        if not decision.start < decision.end <= self.computed:
            raise SteeringViolation(
                f"KV decision of request {decision.request_id} covers [{decision.start}, {decision.end}); "
                f"it must be a non-empty range within the {self.computed} computed positions"
            )
        if self.compressible and decision.start < self.compressible[-1][1]:
            raise SteeringViolation(
                f"KV decision of request {decision.request_id} starts at {decision.start}, but an earlier one ends at "
                f"{self.compressible[-1][1]}; ranges must ascend without overlap"
            )
        start = decision.start
        if self.compressible and self.compressible[-1][1] == start:
            start = self.compressible.pop()[0]
        self.compressible.append((start, decision.end))

    def take_compressible_pages(self, page_size: int) -> list[int]:
        """Places in ``pages`` of full pages all of whose tokens may be stored in 8 bits."""
        places = [
            place
            for start, end in self.compressible
            for place in range(-(-start // page_size), end // page_size)
            if self.pages[place].format is KvFormat.FULL
        ]
        # Only the newest range can still grow; older ranges are done with.
        del self.compressible[:-1]
        return places

"""All state of one request on a shard. Step tensors are built from it and dropped; nothing else holds request state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from chunkwise.core import ChunkDecision, GenerationRequest, RungTable, SteeringViolation
from chunkwise.kv.pages import PageRef
from chunkwise.kv.prefix import PageKey, PrefixNode
from chunkwise.shard.detokenizer import Detokenizer
from chunkwise.shard.retention import Retention
from chunkwise.shard.sampler import TokenChooser
from chunkwise_adapters.gate import GatedSpan, gate_key
from chunkwise_adapters.store import ResidentAdapter


@dataclass(frozen=True, slots=True)
class PrefixTrail:
    """How far a sequence's pages are in the prefix cache: the first ``pages``, of which ``node`` is the last."""

    node: PrefixNode
    pages: int


@dataclass(slots=True)
class RungLookup:
    """The tokens of a ``chunk`` by their ids: ``rungs`` of those that have one of their own; ``position`` is the next
    to be looked up."""

    chunk: ChunkDecision
    rungs: Mapping[int, float]
    position: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One request being served.

    ``ids`` are prompt and generated tokens; ``computed`` of them have their keys and values in ``pages``, but for those
    that ``kv`` says were dropped. A sequence with one token left to compute decodes; with more it is still reading its
    prompt.
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
    lookup: RungLookup | None = None
    kv: Retention = field(default_factory=Retention)
    prompt_logprobs: list[float] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are not computed yet; at least 1 in a live sequence."""
        return len(self.ids) - self.computed

    @property
    def computable(self) -> int:
        """How many of them the next step may compute: none beyond the position of a KV decision that waits."""
        stop = self.kv.next_effective(self.computed)
        return self.remaining if stop is None else min(self.remaining, stop - self.computed)

    def slot(self, position: int) -> int:
        """The place of a position that is not computed yet among the tokens that are kept."""
        return position - self.kv.dropped

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

    def follow(self, chunks: SequenceOf[ChunkDecision], table: Callable[[int], RungTable]) -> None:
        """Takes over chunk decisions, and looks tokens up that have been added since the last call. ``table`` gives a
        rung table by its number.

        Raises:
            SteeringViolation: a decision for a position that is computed already, out of order, behind a chunk with a
                table, or with a table that was not sent.
            InvalidRung: a rung that the adapter's ladder lacks.
        """
        for chunk in chunks:
            if self.lookup is not None:
                raise SteeringViolation(
                    f"a chunk of request {chunk.request_id} starts at {chunk.start} behind one with a rung table, "
                    "which is the last"
                )
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
            if chunk.table and self.adapter is not None:
                self.lookup = RungLookup(chunk, table(chunk.table).rungs, chunk.start)
                for rung in self.lookup.rungs.values():
                    self.adapter.rung_index(rung)
        if self.lookup is not None:
            self._look_up(self.lookup)

    def _look_up(self, lookup: RungLookup) -> None:
        """Opens a chunk wherever the rung of a token differs from that of the token before."""
        for position in range(lookup.position, len(self.ids)):
            rung, newest = lookup.rungs.get(self.ids[position], lookup.chunk.rung), self.chunks[-1]
            if rung == newest.rung:
                continue
            if newest.start == position:
                self.chunks[-1] = replace(newest, rung=rung)
            else:
                self.chunks.append(ChunkDecision(lookup.chunk.request_id, position, rung, lookup.chunk.scale))
        lookup.position = max(lookup.position, len(self.ids))

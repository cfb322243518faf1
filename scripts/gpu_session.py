"""Drives a model step by step without a server, on any device: sequences by name, next-token logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from chunkwise.core import ChunkDecision, KvFormat
from chunkwise.kv.cache import KvCache
from chunkwise.kv.pages import PageRef
from chunkwise.model.llama import Llama, target_slices
from chunkwise.model.spec import ModelSpec
from chunkwise.model.step import StepInput, StepOutput, StepSpan
from chunkwise_adapters.format import LoraPair, LoraWeights
from chunkwise_adapters.gate import GatedSpan, build_segments
from chunkwise_adapters.ladder import RankLadder, build_ladder
from chunkwise_adapters.store import AdapterStore, ResidentAdapter

PAGE_SIZE = 16


def random_ladders(spec: ModelSpec, count: int, rank: int) -> list[RankLadder]:
    """``count`` adapters of ``rank`` on all targets. They share one random ladder, since a decomposition takes seconds;
    on a GPU each has memory of its own."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        key: LoraPair(
            a=torch.randn(rank, width, generator=generator) / width**0.5,
            b=torch.randn(out, rank, generator=generator) * 0.1,
            trained_rank=rank,
            scale=1.0,
        )
        for key, (out, width) in spec.target_shapes().items()
    }
    ladder = build_ladder(LoraWeights("random", "random", modules))
    return [replace(ladder, name=f"random-{i}", content_hash=f"random-{i}") for i in range(count)]


@dataclass
class Stream:
    """One sequence: how many tokens are computed, its pages, its adapter and its chunks."""

    adapter: ResidentAdapter | None
    chunks: tuple[ChunkDecision, ...]
    computed: int = 0
    pages: list[PageRef] = field(default_factory=list)


class Session:
    """A model with a cache of ``pages`` pages and the adapters of ``ladders``."""

    def __init__(self, model: Llama, ladders: Sequence[RankLadder], pages: int) -> None:
        self.model = model
        store = AdapterStore(target_slices(model.spec, model.plan), model.dtype, model.device)
        self.adapters = [store.add(ladder) for ladder in ladders]
        shape = model.kv_shape(PAGE_SIZE)
        # On a GPU some of the budget goes to small pages.
        self.cache = KvCache(shape, model.dtype, model.device, 2 * pages * shape.page_bytes(model.dtype)[KvFormat.FULL])
        self.streams: dict[str, Stream] = {}

    def open(self, name: str, adapter: int | None = None, chunks: Sequence[tuple[int, int | None, int]] = ()) -> None:
        """A new sequence with the adapter of that index; ``chunks`` are (start, rung, cross-fade)."""
        decisions = tuple(ChunkDecision(0, start, rung, 1.0, crossfade) for start, rung, crossfade in chunks)
        self.streams[name] = Stream(None if adapter is None else self.adapters[adapter], decisions)

    def compress(self, name: str) -> None:
        """Store the complete pages of a sequence in 8 bits, every other of them in 4."""
        stream = self.streams[name]
        complete = stream.computed // PAGE_SIZE
        for first, kind in enumerate((KvFormat.INT8, KvFormat.INT4)):
            stream.pages[first:complete:2] = self.cache.compress(stream.pages[first:complete:2], kind)

    def step(self, tokens: Mapping[str, Sequence[int]]) -> StepOutput:
        """Compute ``tokens`` of the named sequences, those with one token first; outputs are in that order."""
        output = self.model.forward(self.prepare(tokens), self.cache)
        for name, ids in tokens.items():
            self.streams[name].computed += len(ids)
        return output

    def prepare(self, tokens: Mapping[str, Sequence[int]]) -> StepInput:
        """The step that computes ``tokens``; takes the pages for them."""
        ordered = sorted(tokens.items(), key=lambda item: len(item[1]) > 1)
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[StepSpan] = []
        gated: list[GatedSpan] = []
        for name, new in ordered:
            stream, row = self.streams[name], len(ids)
            context = stream.computed + len(new)
            while len(stream.pages) * PAGE_SIZE < context:
                stream.pages.append(self.cache.allocate(KvFormat.FULL))
            ids += new
            positions += range(stream.computed, context)
            slots += [
                stream.pages[p // PAGE_SIZE].number * PAGE_SIZE + p % PAGE_SIZE for p in range(stream.computed, context)
            ]
            spans.append(StepSpan(row, len(new), context, stream.pages))
            if stream.adapter is not None:
                gated.append(GatedSpan(row, len(new), stream.computed, stream.adapter, stream.chunks))
        device = self.model.device

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return StepInput(
            ids=tensor(ids),
            positions=tensor(positions),
            slots=tensor(slots),
            last_rows=tensor([span.first_row + span.tokens - 1 for span in spans]),
            scored_rows=tensor([]),
            scored_ids=tensor([]),
            spans=tuple(spans),
            segments=build_segments(gated, device),
        )

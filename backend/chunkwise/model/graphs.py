"""Decode steps as CUDA graphs: one replay in place of some thousand launches, which take longer than the work itself.

A graph repeats launches with the addresses, grids and numbers they were captured with. So whatever changes from step to
step lives in buffers of fixed size (`_Buffers`), and a graph serves every step that its `GraphKey` covers. What no
graph covers runs as it would without this module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from chunkwise.kv.cache import KvCache
from chunkwise.model.decoder import Decoder
from chunkwise.model.flash import TabledStep, installed
from chunkwise.model.page_table import PageTable, has_small_pages
from chunkwise.model.parallel import Group
from chunkwise.model.spec import ModelSpec
from chunkwise.model.step import StepInput
from chunkwise_adapters.format import TARGETS
from chunkwise_adapters.ops.table import Capacity, Entries, StepPlan, module_index, plan_step
from chunkwise_adapters.store import ResidentAdapter

MOST_SEQUENCES = 64
# Programs beyond a tile's rank end at once, while a graph more costs a capture: so one size for the usual adapters.
_LEAST_RANK = 64
_RUNGS = 16

Result = tuple[Tensor, Tensor | None]
"""What `Decoder.run` returns."""


class GraphKey(NamedTuple):
    """What a graph was captured for: decode steps of up to ``sequences`` sequences, with adapters of active ranks up to
    ``rank`` (0: none), and with small pages or without."""

    sequences: int
    rank: int
    mixed: bool


def at_least(needed: int, least: int = 1) -> int:
    """The smallest power of two that is neither below ``needed`` nor below ``least``."""
    return 1 << (max(needed, least) - 1).bit_length()


def graph_key(step: StepInput, rank: int) -> GraphKey:
    """The graph that serves a decode step whose adapters need active ranks up to ``rank``. Its sizes are powers of two,
    so that a few graphs serve all steps."""
    mixed = any(has_small_pages(span.pages) for span in step.spans)
    return GraphKey(at_least(len(step.spans)), at_least(rank, _LEAST_RANK) if rank else 0, mixed)


def fits_a_graph(step: StepInput) -> bool:
    """Whether a step is one token each of not too many sequences, with no prompt logprobs wanted."""
    return (
        0 < len(step.spans) <= MOST_SEQUENCES
        and all(span.tokens == 1 for span in step.spans)
        and step.scored_rows.shape[0] == 0
    )


class Graph(Protocol):
    """Launches that were recorded once and can be repeated."""

    def record(self, run: Callable[[], Result]) -> Result:
        """Record the launches of ``run``, which may be called more than once and waits for no result; returns where
        `replay` leaves its results."""
        ...

    def replay(self) -> None:
        """Repeat the launches on what the buffers hold now."""
        ...


class CudaGraph:
    """A `Graph` of the current CUDA device. Graphs of one ``pool`` share memory: their results are good until the next
    replay of any of them."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def record(self, run: Callable[[], Result]) -> Result:
        """See `Graph`. Runs twice beforehand on a side stream: compilation and set-up must not happen in a capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=self._pool):
            return run()

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()


class _Buffers:
    """What a graph reads: the step, in tensors that stay where they are."""

    def __init__(self, key: GraphKey, step: StepInput, pages: int, lora: Any, segments: Any) -> None:
        n = key.sequences
        self._table = PageTable(n, pages, key.mixed, step.ids.device)
        self._lora = lora
        self.step = TabledStep(
            ids=step.ids.new_zeros(n),
            positions=step.positions.new_zeros(n),
            slots=step.slots.new_zeros(n),
            last_rows=step.last_rows,
            scored_rows=step.scored_rows,
            scored_ids=step.scored_ids,
            spans=(),
            segments=segments,
            table=self._table,
        )

    def load(self, step: StepInput, plan: StepPlan) -> None:
        """Fill the buffers. Rows beyond the step's write to slot 0, which is padding's, and attend to it alone."""
        for name in ("ids", "positions", "slots"):
            buffer, values = getattr(self.step, name), getattr(step, name)
            buffer[: len(values)].copy_(values)
            buffer[len(values) :].zero_()
        self._table.load([span.pages for span in step.spans], [span.context for span in step.spans])
        if self._lora is not None:
            self._lora.table.load(plan)


class _Captured(NamedTuple):
    buffers: _Buffers
    graph: Graph
    result: Result


class GraphDecoder:
    """A `Decoder` that runs decode steps of ``inner`` as graphs, captured when they are first needed. Needs Triton:
    its kernels are the ones that read page tables and LoRA tables by address.

    Args:
        new_graph: makes an empty graph on the device.
        blocks: of the LoRA kernels (None: their default).
    """

    def __init__(self, inner: Decoder, spec: ModelSpec, new_graph: Callable[[], Graph], blocks: Any = None) -> None:
        self._inner = inner
        self._spec = spec
        self._new_graph = new_graph
        self._ops = import_module("chunkwise_adapters.ops.triton")
        self._blocks = blocks or self._ops.Blocks()
        self._described: WeakKeyDictionary[ResidentAdapter, Entries] = WeakKeyDictionary()
        self._graphs: dict[GraphKey, _Captured] = {}
        self._cache: Callable[[], KvCache | None] = lambda: None

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """See `Decoder`."""
        return self._inner.logits(x, rows)

    def run(self, step: StepInput, cache: KvCache) -> Result:
        """See `Decoder`."""
        if not fits_a_graph(step):
            return self._inner.run(step, cache)
        plan = plan_step(step.segments, self._blocks.small_tile, self._described)
        key = graph_key(step, plan.needs.rank)
        if not self._capacity(key).fits(plan.needs):
            return self._inner.run(step, cache)
        captured = self._captured(key, step, plan, cache)
        captured.buffers.load(step, plan)
        captured.graph.replay()
        hidden, spread = captured.result
        n = len(step.spans)
        return hidden[:n], spread[:n] if spread is not None else None

    def _capacity(self, key: GraphKey) -> Capacity:
        n, modules = key.sequences, module_index((self._spec.layers, TARGETS[0]))
        return Capacity(self._blocks.small_tile, n, n, key.rank, n, _RUNGS, modules)

    def _captured(self, key: GraphKey, step: StepInput, plan: StepPlan, cache: KvCache) -> _Captured:
        if self._cache() is not cache:
            # The graphs hold the addresses of another cache. A weak reference, or they would hold its memory as well.
            self._graphs.clear()
            self._cache = ref(cache)
        if key not in self._graphs:
            pages = -(-self._spec.max_position // cache.shape.page_size)
            lora = self._ops.LoraStep(self._capacity(key), step.ids.device, self._blocks) if key.rank else None
            segments = self._ops.PreparedSegments.of(lora) if key.rank else ()
            buffers = _Buffers(key, step, pages, lora, segments)
            buffers.load(step, plan)
            graph = self._new_graph()
            result = graph.record(lambda: self._inner.run(buffers.step, cache))
            self._graphs[key] = _Captured(buffers, graph, result)
        return self._graphs[key]


def with_graphs(decoder: Decoder, spec: ModelSpec, group: Group, device: torch.device) -> Decoder:
    """``decoder`` with graphs where they are known to be sound: on a CUDA device with Triton and one rank. Collectives
    inside a graph have not been tried, so several ranks run without."""
    if device.type != "cuda" or group.world_size > 1 or not installed("triton"):
        return decoder
    pool = torch.cuda.graph_pool_handle()
    return GraphDecoder(decoder, spec, partial(CudaGraph, pool))

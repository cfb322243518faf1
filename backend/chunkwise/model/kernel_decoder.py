"""The decoder layers in CPU kernels: hands the kernels addresses and small tables, and keeps the memory behind them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from chunkwise.core import KvFormat, UnsupportedModel
from chunkwise.kv.cache import KvCache
from chunkwise.kv.pools import PARTS
from chunkwise.model.decoder import signal_layers
from chunkwise.model.kernels.attention import STATE, STRETCH, scratch_floats, tasks_of
from chunkwise.model.kernels.blocks import decoder, head
from chunkwise.model.kernels.team import Team
from chunkwise.model.kernels.views import (
    BFLOAT16,
    FLOAT32,
    INT4,
    INT8,
    PAGE_FORMATS,
    TARGETS,
    BufferView,
    CacheView,
    Ints,
    ModelView,
    StepView,
)
from chunkwise.model.linear import FOUR_BITS, GROUP, Projection
from chunkwise.model.loading import Layer, Weights
from chunkwise.model.parallel import Group, ShardPlan
from chunkwise.model.rotary import Rotary
from chunkwise.model.spec import TARGETS as TARGET_NAMES
from chunkwise.model.spec import ModelSpec
from chunkwise.model.step import StepInput, StepSpan
from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.store import ResidentAdapter

_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8, FOUR_BITS: INT4}


def _ints(values: object) -> Ints:
    return np.ascontiguousarray(values, dtype=np.int64)


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


class _Adapter:
    """The addresses ``a`` and ``b`` ``[layers · 7]`` and active ranks ``ranks`` ``[rungs, layers · 7]`` of one adapter;
    a module it does not adapt has rank 0."""

    def __init__(self, adapter: ResidentAdapter, layers: int) -> None:
        self.a, self.b = _ints(np.zeros(layers * TARGETS)), _ints(np.zeros(layers * TARGETS))
        self.ranks = _ints(np.zeros((len(adapter.rungs), layers * TARGETS)))
        for (layer, target), module in adapter.modules.items():
            place = layer * TARGETS + TARGET_NAMES.index(target)
            self.a[place], self.b[place] = _address(module.a), _address(module.b_t)
            self.ranks[:, place] = module.active_ranks


def _projections(layer: Layer) -> tuple[Projection, Projection, Projection, Projection]:
    return layer.qkv, layer.output, layer.gate_up, layer.down


def _model_view(spec: ModelSpec, plan: ShardPlan, weights: Weights, rotary: Rotary, rank: int) -> ModelView:
    layers = [_projections(layer) for layer in weights.layers]
    columns = [columns for projection in layers[0] for _, columns in projection.columns]
    signals = signal_layers(spec, rank)

    def table(name: str) -> Ints:
        fields = {
            "weights": lambda p: p.weight.data,
            "scales": lambda p: p.weight.scales,
            "middles": lambda p: p.weight.middles,
            "biases": lambda p: p.bias,
        }
        return _ints([[_address(fields[name](projection)) for projection in layer] for layer in layers])

    return ModelView(
        layers=spec.layers,
        hidden=spec.hidden,
        heads=plan.n_heads,
        kv_heads=plan.n_kv_heads,
        head_dim=spec.head_dim,
        intermediate=plan.mlp.stop - plan.mlp.start,
        vocab=weights.head.shape[0],
        eps=spec.norm_eps,
        kind=int(_KINDS[layers[0][0].weight.data.dtype]),
        head_kind=int(_KINDS[weights.head.data.dtype]),
        weights=table("weights"),
        scales=table("scales"),
        middles=table("middles"),
        biases=table("biases"),
        norms=_ints([[_address(layer.input_norm), _address(layer.mlp_norm)] for layer in weights.layers]),
        outs=_ints([projection.weight.shape[0] for projection in layers[0]]),
        ins=_ints([projection.weight.shape[1] for projection in layers[0]]),
        first_target=_ints(list(accumulate((len(projection.columns) for projection in layers[0]), initial=0))),
        columns=_ints([[part.start, part.stop] for part in columns]),
        signal=_ints([signals.index(i) if i in signals else -1 for i in range(spec.layers)]),
        final_norm=_address(weights.norm),
        head=_address(weights.head.data),
        head_scales=_address(weights.head.scales),
        cos=_address(rotary.cos),
        sin=_address(rotary.sin),
    )


class _Size(NamedTuple):
    """What buffers hold at most: rows, columns of shrink outputs, attention records; and the KV page size."""

    rows: int = 8
    rank: int = 1
    records: int = 8
    page: int = 1

    def grown(self, other: _Size) -> _Size:
        """Enough for both; rows and records in powers of two, so that slowly growing batches do not allocate at every
        step."""
        rows, rank, records, page = map(max, self, other)
        return _Size(1 << (rows - 1).bit_length(), rank, 1 << (records - 1).bit_length(), page)


class _Buffers:
    """Working memory of a team for steps up to ``size``."""

    def __init__(self, m: ModelView, size: _Size, team: Team) -> None:
        widest_in = max(m.hidden, int(m.ins.max()))
        rows, rank, self.size = size.rows, size.rank, size
        self.x = torch.empty(rows, m.hidden)
        self.partial = torch.empty(rows, m.hidden)
        self.spread = torch.empty(max(int(m.signal.max()) + 1, 1), rows)
        self._tickets = np.zeros(m.layers, dtype=np.int64)
        floats = -(-scratch_floats(m.heads, m.kv_heads, m.head_dim, size.page) // 16) * 16
        self._others = (
            torch.empty(rows, widest_in),
            torch.empty(rows, widest_in, dtype=torch.int16) if max(m.kind, m.head_kind) >= INT8 else torch.empty(0),
            torch.empty(rows),
            torch.empty(rows, -(-widest_in // GROUP)),
            torch.empty(rows, int(m.outs.max())),
            torch.empty(3, rows, rank),
            torch.empty(team.threads, floats),
            torch.empty(size.records, m.heads, STATE + m.head_dim),
        )
        inputs, shorts, row_scales, group_sums, wide, shrunk, scratch, records = (
            tensor.data_ptr() for tensor in self._others
        )
        self.view = BufferView(
            x=self.x.data_ptr(),
            inputs=inputs,
            shorts=shorts,
            row_scales=row_scales,
            group_sums=group_sums,
            wide=wide,
            partial=self.partial.data_ptr(),
            shrunk=shrunk,
            rows=rows,
            rank=rank,
            scratch=scratch,
            scratch_floats=floats,
            records=records,
            sync=team.sync,
            tickets=self._tickets.ctypes.data,
            spread=self.spread.data_ptr(),
        )

    def start(self, x: Tensor) -> Tensor:
        """Takes the embedded tokens; returns where the residual stream lies."""
        self._tickets[:] = 0
        self.partial[: x.shape[0]] = 0.0
        stream = self.x[: x.shape[0]]
        return stream.copy_(x)


def _cache_view(cache: KvCache) -> CacheView:
    pools = [cache.pools[kind] for kind in (KvFormat.FULL, KvFormat.INT8, KvFormat.INT4)]
    return CacheView(
        page_size=cache.shape.page_size,
        pools=_ints([pool.address for pool in pools]),
        strides=_ints([[pool.page_bytes, pool.layer_bytes] for pool in pools]),
        parts=_ints([[pool.offsets.get(part, 0) for part in PARTS] for pool in pools]),
    )


def _encode(spans: Sequence[StepSpan]) -> tuple[Ints, Ints]:
    """Page tables one after another, and where each begins."""
    pages = [PAGE_FORMATS * page.number + page.format for span in spans for page in span.pages]
    return _ints(pages), _ints(list(accumulate((len(span.pages) for span in spans), initial=0)))


class KernelDecoder:
    """A `Decoder` on CPU in fp32, with fp32, bf16, int8 or int4 matrices, on ``threads`` threads.

    A row's numbers depend on its own sequence alone: they are the same bits in any batch and however its prompt is cut
    into steps. Over several tensor-parallel ranks that holds per world size.

    Raises:
        UnsupportedModel: weights that are not on the CPU, or of another type.
    """

    def __init__(
        self, spec: ModelSpec, plan: ShardPlan, weights: Weights, group: Group, rotary: Rotary, threads: int
    ) -> None:
        norm, stored = weights.norm, weights.layers[0].qkv.weight.data.dtype
        if norm.dtype != torch.float32 or norm.device.type != "cpu" or stored not in _KINDS:
            raise UnsupportedModel(
                f"the CPU kernels compute in float32 on matrices of {', '.join(map(str, _KINDS))}, not in {norm.dtype} "
                f"on {stored} and {norm.device}; run without kernels"
            )
        self._weights, self._rotary = weights, rotary
        self._group = group
        self._layers = spec.layers
        self._model = _model_view(spec, plan, weights, rotary, group.rank)
        self._team = Team(threads)
        self._buffers = _Buffers(self._model, _Size(), self._team)
        self._adapters: WeakKeyDictionary[ResidentAdapter, _Adapter] = WeakKeyDictionary()

    def run(self, x: Tensor, step: StepInput, cache: KvCache) -> tuple[Tensor, Tensor | None]:
        """See `Decoder`."""
        view = self._step_view(step)
        assert STRETCH % cache.shape.page_size == 0, f"pages of {cache.shape.page_size} do not divide {STRETCH} keys"
        pools = _cache_view(cache)
        rank, records = int(view.ranks.max(initial=1)), int(view.first_record[-1])
        buffers = self._reserve(_Size(x.shape[0], rank, records, cache.shape.page_size))
        stream = buffers.start(x)
        partial, blocks = buffers.partial[: x.shape[0]], 2 * self._model.layers
        # Several ranks add up their partial sums behind each block.
        size = blocks if self._group.world_size == 1 else 1
        for block in range(0, blocks, size):
            self._team.run(decoder, self._model, buffers.view, view, pools, block, block + size)
            if size == 1:
                self._group.sum_(partial)
        stream += partial
        signals = int(self._model.signal.max()) + 1
        if signals == 0:
            return stream, None
        spread = buffers.spread.view(-1)[: signals * view.sequences].view(signals, view.sequences)
        return stream, spread.mean(dim=0)

    def logits(self, x: Tensor) -> Tensor:
        """See `Decoder`."""
        rows, out = x.contiguous(), torch.empty(x.shape[0], self._model.vocab)
        if x.shape[0] == 0:
            return out
        buffers = self._reserve(_Size(rows=x.shape[0]))
        self._team.run(head, self._model, buffers.view, rows.data_ptr(), rows.shape[0], out.data_ptr())
        return out

    def _reserve(self, size: _Size) -> _Buffers:
        size = self._buffers.size.grown(size)
        if size != self._buffers.size:
            self._buffers = _Buffers(self._model, size, self._team)
        return self._buffers

    def _step_view(self, step: StepInput) -> StepView:
        pages, first_page = _encode(step.spans)
        tasks = [tasks_of(span.tokens, span.context, self._model.kv_heads) for span in step.spans]
        records = [count if span.tokens == 1 else 0 for count, span in zip(tasks, step.spans, strict=True)]
        return StepView(
            tokens=step.ids.shape[0],
            sequences=len(step.spans),
            groups=len(step.segments),
            positions=_ints(step.positions.numpy()),
            slots=_ints(step.slots.numpy()),
            first_row=_ints([span.first_row for span in step.spans]),
            lengths=_ints([span.tokens for span in step.spans]),
            contexts=_ints([span.context for span in step.spans]),
            first_page=first_page,
            pages=pages,
            first_task=_ints(list(accumulate(tasks, initial=0))),
            first_record=_ints(list(accumulate(records, initial=0))),
            **self._groups(step.segments),
        )

    def _adapter(self, adapter: ResidentAdapter) -> _Adapter:
        if adapter not in self._adapters:
            self._adapters[adapter] = _Adapter(adapter, self._layers)
        return self._adapters[adapter]

    def _groups(self, segments: Sequence[LoraSegment]) -> dict[str, Any]:
        """The LoRA fields of `StepView`."""
        modules, adapters = self._layers * TARGETS, [self._adapter(segment.adapter) for segment in segments]
        rungs = max((len(adapter.ranks) for adapter in adapters), default=1)
        rung_ranks = np.zeros((len(segments), rungs, modules), dtype=np.int64)
        for i, adapter in enumerate(adapters):
            rung_ranks[i, : len(adapter.ranks)] = adapter.ranks
        rows = [segment.row_numbers() for segment in segments]
        runs = np.array([run for segment in segments for run in segment.runs], dtype=np.float64).reshape(-1, 5)
        members = np.repeat(runs, runs[:, 0].astype(np.int64), axis=0)
        return {
            "first_member": _ints(list(accumulate((len(part) for part in rows), initial=0))),
            "rows": _ints(np.concatenate(rows) if rows else []),
            "consecutive": _ints([part[-1] - part[0] + 1 == len(part) for part in rows]),
            "plain": _ints([segment.plain for segment in segments]),
            "a": _ints([adapter.a for adapter in adapters]).reshape(-1, modules),
            "b": _ints([adapter.b for adapter in adapters]).reshape(-1, modules),
            "ranks": _ints([a.ranks[s.rung] for a, s in zip(adapters, segments, strict=True)]).reshape(-1, modules),
            "rung_ranks": rung_ranks,
            "rung": _ints(members[:, 1]),
            "weight": np.ascontiguousarray(members[:, 2], dtype=np.float32),
            "previous_rung": _ints(members[:, 3]),
            "previous_weight": np.ascontiguousarray(members[:, 4], dtype=np.float32),
        }

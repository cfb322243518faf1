"""The decoder layers in CPU kernels: hands the kernels addresses and small tables, and keeps the memory behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from numpy.typing import NDArray
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
from chunkwise.model.step import StepInput
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
        first_target=_ints(_starts(len(projection.columns) for projection in layers[0])),
        columns=_ints([[part.start, part.stop] for part in columns]),
        signal=_ints([signals.index(i) if i in signals else -1 for i in range(spec.layers)]),
        final_norm=_address(weights.norm),
        embedding=_address(weights.embedding.data),
        embedding_scales=_address(weights.embedding.scales),
        first_id=plan.vocab.start,
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
        self.spread = torch.empty(max(int(m.signal.max()) + 1, 1) * rows)
        self._tickets = np.zeros(m.layers, dtype=np.int64)
        floats = max(scratch_floats(m.heads, m.kv_heads, m.head_dim, size.page), int(m.outs.max()))
        floats = -(-floats // 16) * 16
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

    def begin(self) -> None:
        """What a step expects."""
        self._tickets[:] = 0


def _cache_view(cache: KvCache) -> CacheView:
    pools = [cache.pools[kind] for kind in (KvFormat.FULL, KvFormat.INT8, KvFormat.INT4)]
    return CacheView(
        page_size=cache.shape.page_size,
        pools=_ints([pool.address for pool in pools]),
        strides=_ints([[pool.page_bytes, pool.layer_bytes] for pool in pools]),
        parts=_ints([[pool.offsets.get(part, 0) for part in PARTS] for pool in pools]),
    )


def _starts(lengths: Iterable[int]) -> list[int]:
    """Where each of consecutive parts begins, and where the last one ends."""
    return list(accumulate(lengths, initial=0))


def _tables(lists: Mapping[str, Sequence[int]]) -> dict[str, Ints]:
    """Every list as an array, all of them in one piece of memory: to make a dozen small arrays takes longer."""
    numbers, bounds = _ints(list(chain.from_iterable(lists.values()))), _starts(map(len, lists.values()))
    return {name: numbers[start:stop] for name, (start, stop) in zip(lists, pairwise(bounds), strict=True)}


class _Groups(NamedTuple):
    """What `StepView` says of the adapters of LoRA groups; and the most columns that a module's shrink output has."""

    a: Ints
    b: Ints
    ranks: Ints
    rung_ranks: NDArray[np.int64]
    most: int


def _group(adapters: Sequence[_Adapter], rungs: Sequence[int], modules: int) -> _Groups:
    rung_ranks = np.zeros((len(adapters), max((len(a.ranks) for a in adapters), default=1), modules), dtype=np.int64)
    for i, adapter in enumerate(adapters):
        rung_ranks[i, : len(adapter.ranks)] = adapter.ranks
    ranks = _ints([adapter.ranks[rung] for adapter, rung in zip(adapters, rungs, strict=True)]).reshape(-1, modules)
    return _Groups(
        a=_ints([adapter.a for adapter in adapters]).reshape(-1, modules),
        b=_ints([adapter.b for adapter in adapters]).reshape(-1, modules),
        ranks=ranks,
        rung_ranks=rung_ranks,
        most=int(ranks.max(initial=1)),
    )


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
        self._signals = bool((self._model.signal >= 0).any())
        # Of the step before: the same adapters and the same cache mostly come again.
        self._grouped: tuple[list[tuple[_Adapter, int]], _Groups] = ([], _group([], [], self._layers * TARGETS))
        self._cached: tuple[Callable[[], KvCache | None], CacheView | None] = (lambda: None, None)

    def run(self, step: StepInput, cache: KvCache) -> tuple[Tensor, Tensor | None]:
        """See `Decoder`."""
        groups = self._groups_of(step.segments)
        view = self._step_view(step, groups)
        size = _Size(view.tokens, groups.most, int(view.first_record[-1]), cache.shape.page_size)
        buffers = self._reserve(size)
        buffers.begin()
        pools, blocks = self._cache_view(cache), 2 * self._model.layers + 2
        # Several ranks add up their partial sums behind each block.
        at_once = blocks if self._group.world_size == 1 else 1
        for block in range(0, blocks, at_once):
            self._team.run(decoder, self._model, buffers.view, view, pools, block, block + at_once)
            if block + at_once < blocks:
                self._group.sum_(buffers.partial[: view.tokens])
        return buffers.x[: view.tokens], buffers.spread[: view.sequences].clone() if self._signals else None

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """See `Decoder`."""
        out = torch.empty(rows.shape[0], self._model.vocab)
        if rows.shape[0] > 0:
            buffers = self._reserve(_Size(rows=rows.shape[0]))
            self._team.run(head, self._model, buffers.view, _address(x), rows.numpy(), out.data_ptr())
        return out

    def _reserve(self, size: _Size) -> _Buffers:
        size = self._buffers.size.grown(size)
        if size != self._buffers.size:
            self._buffers = _Buffers(self._model, size, self._team)
        return self._buffers

    def _cache_view(self, cache: KvCache) -> CacheView:
        known, view = self._cached
        if view is None or known() is not cache:
            size = cache.shape.page_size
            assert STRETCH % size == 0, f"pages of {size} do not divide {STRETCH} keys"
            view = _cache_view(cache)
            self._cached = ref(cache), view
        return view

    def _step_view(self, step: StepInput, groups: _Groups) -> StepView:
        spans, segments = step.spans, step.segments
        tasks = [tasks_of(span.tokens, span.context, self._model.kv_heads) for span in spans]
        rows = [segment.row_numbers() for segment in segments]
        plain = [segment.plain for segment in segments]
        # Gates that are 1 everywhere are not looked at.
        gated = [] if all(plain) else [run for segment in segments for run in segment.runs for _ in range(run.n_tokens)]
        tables = _tables(
            {
                "first_row": [span.first_row for span in spans],
                "lengths": [span.tokens for span in spans],
                "contexts": [span.context for span in spans],
                "first_page": _starts(len(span.pages) for span in spans),
                "pages": [PAGE_FORMATS * page.number + page.format for span in spans for page in span.pages],
                "first_task": _starts(tasks),
                "first_record": _starts(
                    count if span.tokens == 1 else 0 for count, span in zip(tasks, spans, strict=True)
                ),
                "first_member": _starts(map(len, rows)),
                "rows": list(chain.from_iterable(rows)),
                "consecutive": [part[-1] - part[0] + 1 == len(part) for part in rows],
                "plain": plain,
                "rung": [run.rung for run in gated],
                "previous_rung": [run.previous_rung for run in gated],
            }
        )
        return StepView(
            tokens=step.ids.shape[0],
            sequences=len(spans),
            groups=len(segments),
            ids=step.ids.numpy(),
            positions=step.positions.numpy(),
            slots=step.slots.numpy(),
            a=groups.a,
            b=groups.b,
            ranks=groups.ranks,
            rung_ranks=groups.rung_ranks,
            weight=np.array([run.weight for run in gated], dtype=np.float32),
            previous_weight=np.array([run.previous_weight for run in gated], dtype=np.float32),
            **tables,
        )

    def _adapter(self, adapter: ResidentAdapter) -> _Adapter:
        if adapter not in self._adapters:
            self._adapters[adapter] = _Adapter(adapter, self._layers)
        return self._adapters[adapter]

    def _groups_of(self, segments: Sequence[LoraSegment]) -> _Groups:
        key = [(self._adapter(segment.adapter), segment.rung) for segment in segments]
        if key != self._grouped[0]:
            adapters, rungs = [adapter for adapter, _ in key], [rung for _, rung in key]
            self._grouped = key, _group(adapters, rungs, self._layers * TARGETS)
        return self._grouped[1]

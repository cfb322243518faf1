"""The gated LoRA update on GPUs: two Triton kernels over a step's tiles, whatever adapters and ranks are mixed in it.

`shrink` computes ``h = A'[:k] x`` and `expand` adds ``B'[:, :k] (g ⊙ h)`` to y; one launch each per module serves all
segments. A program reads its tile's adapter, rank and factor addresses from the `StepTable`, so it touches the active
rows of the factors and nothing else, and a tile of rank 0 ends at once. Nothing is added by atomics: results do not
depend on the order in which programs run.

With TRITON_INTERPRET=1 the kernels run on CPU tensors; that is how they are tested without a GPU. The interpreter's
product takes bf16 numbers for their bits (seen in Triton 3.9), so there UPCAST widens its operands, after rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunkwise_adapters.format import ModuleKey
from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.ops.table import Capacity, Entries, StepTable, module_index, plan_step
from chunkwise_adapters.store import ResidentAdapter

# With up to this many tiles the input columns of each are divided over several programs, or a few multiprocessors would
# read long rows while the others idle. The partial sums are stored apart and added by `expand`.
_FEW_TILES = 32


class Blocks(NamedTuple):
    """Sizes of what one program computes; powers of two, at least 16. Results depend on them by rounding only.

    A tile has ``small_tile`` tokens if no segment is longer, else ``large_tile``; ``ranks``, ``inputs`` and ``outputs``
    are columns of A', x and y; ``splits`` is how many programs share a tile's input columns where tiles are few.
    """

    small_tile: int = 16
    large_tile: int = 64
    ranks: int = 16
    inputs: int = 64
    outputs: int = 64
    splits: int = 8


_jit: Callable[[Callable[..., None]], Any] = triton.jit(
    do_not_specialize=["module", "slots", "width", "h_width"]
)  # these vary from step to step; a new value must not compile anew


@_jit
def shrink(
    x: tl.tensor,
    h: tl.tensor,
    tiles: tl.tensor,
    rows: tl.tensor,
    factors: tl.tensor,
    module: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    h_width: tl.tensor,
    x_stride: tl.tensor,
    inputs: tl.tensor,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    INPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """``h[p, s, c] = Σ_i x[row(p), i] a[c, i]`` over the s-th share of i, for the columns c below the tile's rank.

    Grid: tiles, blocks of RANKS columns, splits. ``x`` [T, inputs] with ``x_stride``; ``h`` fp32 [n, SPLITS, h_width].
    """
    tile = tiles + 4 * tl.program_id(0)
    n = tl.load(tile + 1)
    entry = factors + (module * slots + tl.load(tile + 2)) * width
    rank = tl.load(entry + 2 + tl.load(tile + 3)).to(tl.int32)
    column = tl.program_id(1) * RANKS
    if (n == 0) | (column >= rank):
        return
    a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(x.dtype.element_ty)), 16)
    place = tl.load(tile) + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < n
    row = tl.load(rows + place, mask=live, other=0).to(tl.int64)
    columns = column + tl.arange(0, RANKS)
    active = columns < rank
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(inputs, SPLITS), INPUTS) * INPUTS
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, inputs), INPUTS):
        i = start + tl.arange(0, INPUTS)
        x_at = x + row[:, None] * x_stride + i[None, :]
        x_tile = tl.load(x_at, mask=live[:, None] & (i < inputs)[None, :], other=0.0)
        a_at = a + columns[None, :] * inputs + i[:, None]
        a_tile = tl.load(a_at, mask=active[None, :] & (i < inputs)[:, None], other=0.0)
        if UPCAST:
            x_tile, a_tile = x_tile.to(tl.float32), a_tile.to(tl.float32)
        total = tl.dot(x_tile, a_tile, total, input_precision="ieee")
    h_at = h + (place * SPLITS + split)[:, None] * h_width + columns[None, :]
    tl.store(h_at, total, mask=live[:, None] & active[None, :])


@_jit
def expand(
    y: tl.tensor,
    h: tl.tensor,
    tiles: tl.tensor,
    rows: tl.tensor,
    rungs: tl.tensor,
    weights: tl.tensor,
    factors: tl.tensor,
    module: tl.tensor,
    slots: tl.tensor,
    width: tl.tensor,
    h_width: tl.tensor,
    y_stride: tl.tensor,
    outputs: tl.tensor,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """``y[row(p), o] += Σ_c g[p, c] (Σ_s h[p, s, c]) b_t[c, o]`` for the columns c below the tile's rank, where
    ``g[p, c] = weight·[c < rank] + previous weight·[c < previous rank]``, the token's ranks in this module.

    Grid: tiles, blocks of OUTPUTS outputs. ``y`` [T, outputs] with ``y_stride``; ``h`` as `shrink` leaves it.
    """
    tile = tiles + 4 * tl.program_id(0)
    n = tl.load(tile + 1)
    entry = factors + (module * slots + tl.load(tile + 2)) * width
    rank = tl.load(entry + 2 + tl.load(tile + 3)).to(tl.int32)
    if (n == 0) | (rank == 0):
        return
    b_t = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(y.dtype.element_ty)), 16)
    place = tl.load(tile) + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < n
    weight = tl.load(weights + 2 * place, mask=live, other=0.0)
    previous_weight = tl.load(weights + 2 * place + 1, mask=live, other=0.0)
    own_rank = tl.load(entry + 2 + tl.load(rungs + 2 * place, mask=live, other=0))
    previous_rank = tl.load(entry + 2 + tl.load(rungs + 2 * place + 1, mask=live, other=0))
    outs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, rank, RANKS):
        columns = start + tl.arange(0, RANKS)
        active = columns < rank
        hidden = tl.zeros((ROWS, RANKS), tl.float32)
        for split in tl.static_range(SPLITS):
            h_at = h + (place * SPLITS + split)[:, None] * h_width + columns[None, :]
            hidden += tl.load(h_at, mask=live[:, None] & active[None, :], other=0.0)
        gate = tl.where(columns[None, :] < own_rank[:, None], weight[:, None], 0.0)
        gate += tl.where(columns[None, :] < previous_rank[:, None], previous_weight[:, None], 0.0)
        b_at = b_t + columns[:, None] * outputs + outs[None, :]
        b_tile = tl.load(b_at, mask=active[:, None] & (outs < outputs)[None, :], other=0.0)
        gated = (hidden * gate).to(b_tile.dtype)
        if UPCAST:
            gated, b_tile = gated.to(tl.float32), b_tile.to(tl.float32)
        total = tl.dot(gated, b_tile, total, input_precision="ieee")
    row = tl.load(rows + place, mask=live, other=0).to(tl.int64)
    y_at = y + row[:, None] * y_stride + outs[None, :]
    mask = live[:, None] & (outs < outputs)[None, :]
    tl.store(y_at, (tl.load(y_at, mask=mask, other=0.0) + total).to(y.dtype.element_ty), mask=mask)


class LoraStep:
    """The table of a step, and the launches over it. Its addresses and grids depend on ``capacity`` alone, so a
    captured launch may be replayed after another `StepTable.load`."""

    def __init__(self, capacity: Capacity, device: torch.device, blocks: Blocks) -> None:
        self.table = StepTable(capacity, device)
        self._blocks = blocks
        self._splits = blocks.splits if capacity.tiles <= _FEW_TILES else 1
        self._rank_blocks = triton.cdiv(capacity.rank, blocks.ranks)
        hidden = (capacity.rows, self._splits, self._rank_blocks * blocks.ranks)
        self._hidden = torch.empty(hidden, dtype=torch.float32, device=device)

    def add(self, y: Tensor, x: Tensor, key: ModuleKey) -> None:
        """As `TritonLora.__call__`, for the segments that are loaded."""
        table, blocks, module = self.table, self._blocks, module_index(key)
        capacity = table.capacity
        if capacity.rank == 0 or module >= capacity.modules:
            return
        assert x.stride(1) == 1 and y.stride(1) == 1, "the columns of x and y must be adjacent"
        place = (table.factors, module, capacity.adapters, table.factors.shape[2], self._hidden.shape[2])
        sizes = {
            "SPLITS": self._splits,
            "ROWS": capacity.tile_rows,
            "RANKS": blocks.ranks,
            "UPCAST": x.device.type == "cpu",
        }
        shrink[capacity.tiles, self._rank_blocks, self._splits](
            x, self._hidden, table.tiles, table.rows, *place, x.stride(0), x.shape[1], INPUTS=blocks.inputs, **sizes
        )
        expand[capacity.tiles, triton.cdiv(y.shape[1], blocks.outputs)](
            y,
            self._hidden,
            table.tiles,
            table.rows,
            table.rungs,
            table.weights,
            *place,
            y.stride(0),
            y.shape[1],
            OUTPUTS=blocks.outputs,
            **sizes,
        )


class PreparedSegments(tuple[LoraSegment, ...]):
    """Stands for the segments of whatever step is loaded into ``step`` when a launch runs: what a captured graph holds.
    True though it has none of its own, and so keeps no adapter alive."""

    step: LoraStep

    @staticmethod
    def of(step: LoraStep) -> PreparedSegments:
        """The segments of ``step``."""
        prepared = PreparedSegments()
        prepared.step = step
        return prepared

    def __bool__(self) -> bool:
        return True


class TritonLora:
    """The `GatedLora` of one CUDA device. Holds the last step's table, and with it that step's adapters, until the next
    step comes. Launches go to the current device, which must be the tensors'."""

    def __init__(self, device: torch.device, blocks: Blocks | None = None) -> None:
        self._device = device
        self._blocks = blocks or Blocks()
        self._described: WeakKeyDictionary[ResidentAdapter, Entries] = WeakKeyDictionary()
        self._last: tuple[Sequence[LoraSegment], LoraStep] | None = None

    def __call__(self, y: Tensor, x: Tensor, segments: Sequence[LoraSegment], key: ModuleKey) -> None:
        """Add the adapters' outputs of the module ``key`` to ``y``, in place.

        Semantics: as `reference.gated_lora_`, with h and the sums in fp32 and ``g ⊙ h`` rounded to the store's type.

        Shapes: ``y`` [T, out_local], may be a view of columns of a wider tensor; ``x`` [T, in_local]. Types: those of
        the store (fp32, bf16 or fp16). ``segments`` must be one object for all modules of a step: its identity is what
        the step's table is found by.
        """
        self._step(segments).add(y, x, key)

    def _step(self, segments: Sequence[LoraSegment]) -> LoraStep:
        if isinstance(segments, PreparedSegments):
            return segments.step
        if self._last is None or self._last[0] is not segments:
            longest = max((sum(run.n_tokens for run in segment.runs) for segment in segments), default=0)
            small, large = self._blocks.small_tile, self._blocks.large_tile
            plan = plan_step(segments, small if longest <= small else large, self._described)
            step = LoraStep(plan.needs, self._device, self._blocks)
            step.table.load(plan)
            self._last = segments, step
        return self._last[1]

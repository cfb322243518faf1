"""The gated LoRA update ``y_t += B' (g_t ⊙ (A' x_t))`` of one projection's targets, over the groups of a step.

Work and memory traffic follow the groups' active ranks: nothing is padded, and an adapter that several rows share is
read once for them.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from chunkwise.model.kernels.compile import kernel
from chunkwise.model.kernels.product import multiply_floats
from chunkwise.model.kernels.tile_products import CACHE_LINE, FLOAT_ROWS, STRIP, expand_one
from chunkwise.model.kernels.tile_products import expand as expand_tile
from chunkwise.model.kernels.tiles import as_pointer
from chunkwise.model.kernels.vector import LANES
from chunkwise.model.kernels.views import TARGETS

_wide, _narrow, _rest = expand_tile(4), expand_tile(1), expand_tile(0)

# Floats of a cache line.
_LINE = CACHE_LINE // 4
# Rows of A per task: enough to read memory in long runs, few enough to share a small rank among threads.
_TASK_ROWS = 8


@kernel
def _strip(h, ldh, matrix, ldm, k, y, ldy, columns, rows):
    """`STRIP` columns, a vector of them, or fewer than a vector, for 1 to `FLOAT_ROWS` rows."""
    if columns >= STRIP:
        _wide(h, ldh, matrix, ldm, k, y, ldy, columns, rows)
        return STRIP
    if columns >= LANES:
        _narrow(h, ldh, matrix, ldm, k, y, ldy, columns, rows)
        return LANES
    _rest(h, ldh, matrix, ldm, k, y, ldy, columns, rows)
    return columns


@kernel
def accumulate(rows, h, ldh, matrix, ldm, k, y, ldy, columns):
    """``y[t, c] += Σ_k h[t, k] matrix[k, c]`` for ``rows`` t and ``columns`` c."""
    for t in range(0, rows, FLOAT_ROWS):
        c = 0
        while c < columns:
            at, to = h + 4 * t * ldh, y + 4 * (t * ldy + c)
            c += _strip(at, ldh, matrix + 4 * c, ldm, k, to, ldy, columns - c, min(FLOAT_ROWS, rows - t))


@kernel
def _gate(s, group, member, module, h, first, last):
    """Multiplies columns ``first`` to ``last`` of one row's shrink output by its gate."""
    rank = s.rung_ranks[group, s.rung[member], module]
    previous = s.rung_ranks[group, s.previous_rung[member], module]
    values = carray(as_pointer(h), last, np.float32)
    for j in range(first, last):
        weight = s.weight[member] if j < rank else np.float32(0.0)
        if j < previous:
            weight += s.previous_weight[member]
        values[j] *= weight


@kernel
def _shrink_block(b, s, k, group, module, slot, first, last):
    """Rows ``first`` to ``last`` of one A times the rows of one group, gated."""
    start, stop = s.first_member[group], s.first_member[group + 1]
    h, stride = b.shrunk + 4 * slot * b.rows * b.rank, 4 * b.rank
    # Rows that lie together share the reading of A.
    together = stop - start if s.consecutive[group] else 1
    for member in range(start, stop, together):
        row = s.rows[member]
        x, to = b.inputs + 4 * row * k, h + row * stride
        multiply_floats(s.a[group, module], first, last, x, together, k, to, b.rank)
    if not s.plain[group]:
        for member in range(start, stop):
            _gate(s, group, member, module, h + s.rows[member] * stride, first, last)


@kernel
def shrink(m, b, s, layer, projection, me, team):
    """``shrunk[target] = g ⊙ (A' x)`` for every target of the projection and every group that adapts it."""
    task = 0
    targets = m.first_target[projection], m.first_target[projection + 1]
    for group in range(s.groups):
        for target in range(targets[0], targets[1]):
            module = layer * TARGETS + target
            rank = s.ranks[group, module]
            for first in range(0, rank, _TASK_ROWS):
                if task % team == me:
                    last = min(first + _TASK_ROWS, rank)
                    _shrink_block(b, s, m.ins[projection], group, module, target - targets[0], first, last)
                task += 1


@kernel
def _columns(work, begin, per_column, columns):
    """The first column of a matrix that does not belong to the first ``work`` of all, when the matrix begins at
    ``begin`` and each of its columns is so much. Threads begin at a cache line, or a matrix."""
    if work <= begin:
        return 0
    return columns if work >= begin + per_column * columns else (work - begin) // per_column // _LINE * _LINE


@kernel
def expand(m, b, s, layer, projection, y, width, me, team):
    """Adds ``B' shrunk`` to the projection's output ``y`` of ``width`` columns, for every group that adapts it. A
    thread takes whole matrices one after another, as far as the work can be divided so."""
    targets = m.first_target[projection], m.first_target[projection + 1]
    total = 0
    for group in range(s.groups):
        for target in range(targets[0], targets[1]):
            size = s.ranks[group, layer * TARGETS + target] * (m.columns[target, 1] - m.columns[target, 0])
            total += size * (s.first_member[group + 1] - s.first_member[group])
    sums, begin = b.scratch + 4 * me * b.scratch_floats, 0
    for group in range(s.groups):
        one, two = s.first_member[group], s.first_member[group + 1]
        for target in range(targets[0], targets[1]):
            module = layer * TARGETS + target
            rank, columns = s.ranks[group, module], m.columns[target, 1] - m.columns[target, 0]
            if rank == 0:
                continue
            per_column = rank * (two - one)
            first = _columns(total * me // team, begin, per_column, columns)
            last = _columns(total * (me + 1) // team, begin, per_column, columns)
            begin += per_column * columns
            if first >= last:
                continue
            matrix, count = s.b[group, module] + 4 * first, two - one if s.consecutive[group] else 1
            for member in range(one, two, count):
                row = s.rows[member]
                h = b.shrunk + 4 * ((target - targets[0]) * b.rows + row) * b.rank
                to = y + 4 * (row * width + m.columns[target, 0] + first)
                if count == 1:
                    expand_one(h, matrix, columns, rank, to, last - first, sums)
                else:
                    accumulate(count, h, b.rank, matrix, columns, rank, to, width, last - first)

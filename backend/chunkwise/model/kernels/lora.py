"""The gated LoRA update ``y_t += B' (g_t ⊙ (A' x_t))`` of one projection's targets, over the groups of a step.

Work and memory traffic follow the groups' active ranks: nothing is padded, and an adapter that several rows share is
read once for them.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from chunkwise.model.kernels.compile import kernel
from chunkwise.model.kernels.product import multiply_floats
from chunkwise.model.kernels.tile_products import FLOAT_ROWS, STRIP
from chunkwise.model.kernels.tile_products import expand as expand_tile
from chunkwise.model.kernels.tiles import as_pointer
from chunkwise.model.kernels.vector import LANES
from chunkwise.model.kernels.views import TARGETS

_wide, _narrow, _rest = expand_tile(4), expand_tile(1), expand_tile(0)

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
def expand(m, b, s, layer, projection, y, width, first, last):
    """Adds ``B' shrunk`` to the columns ``first`` to ``last`` of the projection's output ``y`` of ``width`` columns."""
    targets = m.first_target[projection], m.first_target[projection + 1]
    for target in range(targets[0], targets[1]):
        begin, end = m.columns[target, 0], m.columns[target, 1]
        start, stop = max(first, begin), min(last, end)
        if start >= stop:
            continue
        module = layer * TARGETS + target
        shrunk = b.shrunk + 4 * (target - targets[0]) * b.rows * b.rank
        for group in range(s.groups):
            rank = s.ranks[group, module]
            if rank == 0:
                continue
            matrix = s.b[group, module] + 4 * (start - begin)
            one, two = s.first_member[group], s.first_member[group + 1]
            count = two - one if s.consecutive[group] else 1
            for member in range(one, two, count):
                row = s.rows[member]
                h, to = shrunk + 4 * row * b.rank, y + 4 * (row * width + start)
                accumulate(count, h, b.rank, matrix, end - begin, rank, to, width, stop - start)

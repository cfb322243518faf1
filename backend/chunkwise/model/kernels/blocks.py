"""A decoder layer in kernels, run by several threads together: each phase divides its rows, columns or tasks by thread
and ends at a barrier. Thread ``me`` of ``team`` calls every function with the same other arguments.

The sum that a block adds to the residual stream is left in ``partial`` and added when the next block starts, so that
tensor-parallel ranks can add theirs up in between.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from chunkwise.model.kernels.attention import attend, join
from chunkwise.model.kernels.compile import entry, kernel
from chunkwise.model.kernels.lora import expand, shrink
from chunkwise.model.kernels.product import bytes_per_row, multiply
from chunkwise.model.kernels.team import meet
from chunkwise.model.kernels.tiles import as_pointer, silu_multiply
from chunkwise.model.kernels.vector import LANES
from chunkwise.model.kernels.views import (
    BFLOAT16,
    DOWN,
    FULL_PAGE,
    GATE_UP,
    INT4,
    INT8,
    KEYS,
    NONE,
    OUTPUT,
    QKV,
    VALUES,
)

_COLUMNS = 16


@kernel
def _part(total, me, team):
    """This thread's columns: the first, and the one after the last."""
    blocks = (total + _COLUMNS - 1) // _COLUMNS
    return min(blocks * me // team * _COLUMNS, total), min(blocks * (me + 1) // team * _COLUMNS, total)


@kernel
def _quantize(b, row, width, kind):
    """``inputs[row]`` as ``shorts[row]`` with one scale, as large as `tile_products.largest_activation` allows, and for
    a matrix of 4 bits the sums of its groups."""
    values = carray(as_pointer(b.inputs + 4 * row * width), width, np.float32)
    shorts = carray(as_pointer(b.shorts + 2 * row * width), width, np.int16)
    largest, poison = np.float32(0.0), np.float32(0.0)
    for i in range(width):
        largest = max(largest, abs(values[i]))
        # max() passes NaN by.
        poison += values[i] * np.float32(0.0)
    scale = poison + largest / np.float32(min(32767, (2**31 - 1) // (127 * (width // LANES + 2))))
    inverse = np.float32(1.0) / scale if scale > np.float32(0.0) else np.float32(0.0)
    for i in range(width):
        shorts[i] = np.int16(np.rint(values[i] * inverse))
    if kind == INT4:
        groups = (width + 31) // 32
        sums = carray(as_pointer(b.group_sums + 4 * row * groups), groups, np.float32)
        for g in range(groups):
            group_sum = 0
            for i in range(32 * g, min(32 * g + 32, width)):
                group_sum += shorts[i]
            sums[g] = np.float32(group_sum)
    # A row that is not finite must stay visible in what is computed from it.
    carray(as_pointer(b.row_scales + 4 * row), 1, np.float32)[0] = scale if np.isfinite(scale) else np.float32(np.nan)


@kernel
def _add_partial(m, b, row):
    x = carray(as_pointer(b.x + 4 * row * m.hidden), m.hidden, np.float32)
    added = carray(as_pointer(b.partial + 4 * row * m.hidden), m.hidden, np.float32)
    for i in range(m.hidden):
        x[i] += added[i]


@kernel
def _embed(m, b, s, row):
    """Begins the residual stream of a row with this rank's part of its token's embedding, which is left in
    ``partial``."""
    x = carray(as_pointer(b.x + 4 * row * m.hidden), m.hidden, np.float32)
    out = carray(as_pointer(b.partial + 4 * row * m.hidden), m.hidden, np.float32)
    id, kind = s.ids[row] - m.first_id, m.head_kind
    size = bytes_per_row(kind, m.hidden)
    for i in range(m.hidden):
        x[i] = np.float32(0.0)
    if id < 0 or id >= m.vocab:
        for i in range(m.hidden):
            out[i] = np.float32(0.0)
    elif kind == INT8:
        numbers = carray(as_pointer(m.embedding + size * id), m.hidden, np.int8)
        scale = carray(as_pointer(m.embedding_scales + 4 * id), 1, np.float32)[0]
        for i in range(m.hidden):
            out[i] = np.float32(numbers[i]) * scale
    elif kind == BFLOAT16:
        halves = carray(as_pointer(m.embedding + size * id), m.hidden, np.uint16)
        bits = carray(as_pointer(b.partial + 4 * row * m.hidden), m.hidden, np.uint32)
        for i in range(m.hidden):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
    else:
        floats = carray(as_pointer(m.embedding + size * id), m.hidden, np.float32)
        for i in range(m.hidden):
            out[i] = floats[i]


@kernel
def _average_spread(m, b, s):
    """Leaves the mean over the layers that report attention spread in the first of them."""
    layers = 0
    for layer in range(m.layers):
        layers = max(layers, m.signal[layer] + 1)
    spread = carray(as_pointer(b.spread), layers * s.sequences, np.float32)
    for sequence in range(s.sequences if layers > 0 else 0):
        value = np.float32(0.0)
        for layer in range(layers):
            value += spread[layer * s.sequences + sequence]
        spread[sequence] = value / np.float32(layers)


@kernel
def _normalise(m, b, weight, source, row, kind):
    """``inputs[row]`` = RMS norm of the hidden state at ``source``, for a matrix of that kind."""
    x = carray(as_pointer(source), m.hidden, np.float32)
    weights = carray(as_pointer(weight), m.hidden, np.float32)
    out = carray(as_pointer(b.inputs + 4 * row * m.hidden), m.hidden, np.float32)
    squares = np.float32(0.0)
    for i in range(m.hidden):
        squares += x[i] * x[i]
    scale = np.float32(1.0 / math.sqrt(squares / m.hidden + m.eps))
    for i in range(m.hidden):
        out[i] = x[i] * scale * weights[i]
    if kind >= INT8:
        _quantize(b, row, m.hidden, kind)


@kernel
def _project(m, b, s, layer, projection, y, me, team):
    """``y`` = inputs times the projection's matrix, plus bias and adapters."""
    k, width = m.ins[projection], m.outs[projection]
    if s.groups > 0:
        shrink(m, b, s, layer, projection, me, team)
        meet(b.sync, team)
    first, last = _part(width, me, team)
    weights, scales, middles = m.weights[layer, projection], m.scales[layer, projection], m.middles[layer, projection]
    x = b.shorts if m.kind >= INT8 else b.inputs
    multiply(m.kind, weights, scales, middles, first, last, x, b.row_scales, b.group_sums, s.tokens, k, y, width)
    if m.biases[layer, projection] != 0:
        bias = carray(as_pointer(m.biases[layer, projection]), width, np.float32)
        for t in range(s.tokens):
            row = carray(as_pointer(y + 4 * t * width), width, np.float32)
            for n in range(first, last):
                row[n] += bias[n]
    meet(b.sync, team)
    if s.groups > 0:
        expand(m, b, s, layer, projection, y, width, me, team)
        meet(b.sync, team)


@kernel
def _rotate(head, cos, sin, dim):
    """Rotates one head in place: its halves are the two coordinates (Hugging Face's layout)."""
    values = carray(as_pointer(head), dim, np.float32)
    c, s = carray(as_pointer(cos), dim, np.float32), carray(as_pointer(sin), dim, np.float32)
    half = dim // 2
    for i in range(half):
        low, high = values[i], values[i + half]
        values[i] = low * c[i] - high * s[i]
        values[i + half] = high * c[i + half] + low * s[i + half]


@kernel
def _place(m, b, s, c, layer, row):
    """Rotates the queries and keys of one row and writes keys and values to the cache."""
    dim, width = m.head_dim, m.kv_heads * m.head_dim
    wide = b.wide + 4 * row * m.outs[QKV]
    angle = 4 * s.positions[row] * dim
    for head in range(m.heads + m.kv_heads):
        _rotate(wide + 4 * head * dim, m.cos + angle, m.sin + angle, dim)
    page, offset = divmod(s.slots[row], c.page_size)
    made = carray(as_pointer(wide + 4 * m.heads * dim), 2 * width, np.float32)
    start = c.pools[FULL_PAGE] + page * c.strides[FULL_PAGE, 0] + layer * c.strides[FULL_PAGE, 1]
    for head in range(m.kv_heads):
        at = start + 4 * (head * c.page_size + offset) * dim
        keys, values = (
            carray(as_pointer(at + c.parts[FULL_PAGE, KEYS]), dim, np.float32),
            carray(as_pointer(at + c.parts[FULL_PAGE, VALUES]), dim, np.float32),
        )
        for d in range(dim):
            keys[d] = made[head * dim + d]
            values[d] = made[width + head * dim + d]


@kernel
def _attention_block(m, b, s, c, layer, me, team):
    """The first half of a layer; leaves the residual sum in ``partial``."""
    for row in range(me, s.tokens, team):
        _add_partial(m, b, row)
        _normalise(m, b, m.norms[layer, 0], b.x + 4 * row * m.hidden, row, m.kind)
    meet(b.sync, team)
    _project(m, b, s, layer, QKV, b.wide, me, team)
    for row in range(me, s.tokens, team):
        _place(m, b, s, c, layer, row)
    meet(b.sync, team)
    attend(m, b, s, c, layer, me)
    meet(b.sync, team)
    for sequence in range(me, s.sequences, team):
        if s.lengths[sequence] == 1:
            join(m, b, s, layer, sequence)
        if m.kind >= INT8:
            for row in range(s.first_row[sequence], s.first_row[sequence] + s.lengths[sequence]):
                _quantize(b, row, m.ins[OUTPUT], m.kind)
    meet(b.sync, team)
    _project(m, b, s, layer, OUTPUT, b.partial, me, team)


@kernel
def _mlp_block(m, b, s, layer, me, team):
    """The second half of a layer; leaves the residual sum in ``partial``."""
    for row in range(me, s.tokens, team):
        _add_partial(m, b, row)
        _normalise(m, b, m.norms[layer, 1], b.x + 4 * row * m.hidden, row, m.kind)
    meet(b.sync, team)
    _project(m, b, s, layer, GATE_UP, b.wide, me, team)
    n = m.intermediate
    for row in range(me, s.tokens, team):
        gate = b.wide + 8 * row * n
        silu_multiply(gate, gate + 4 * n, b.inputs + 4 * row * n, n)
        if m.kind >= INT8:
            _quantize(b, row, n, m.kind)
    meet(b.sync, team)
    _project(m, b, s, layer, DOWN, b.partial, me, team)


@entry
def decoder(m, b, s, c, first, last, me, team):
    """The blocks ``first`` to ``last`` of the embedding, two per layer, attention and MLP, and one that completes the
    residual stream; each of the others leaves a sum in ``partial``."""
    for block in range(first, last):
        layer = (block - 1) // 2
        if block == 0:
            for row in range(me, s.tokens, team):
                _embed(m, b, s, row)
            meet(b.sync, team)
        elif layer == m.layers:
            for row in range(me, s.tokens, team):
                _add_partial(m, b, row)
            if me == 0:
                _average_spread(m, b, s)
            meet(b.sync, team)
        elif block % 2 == 1:
            _attention_block(m, b, s, c, layer, me, team)
        else:
            _mlp_block(m, b, s, layer, me, team)


@entry
def head(m, b, x, rows, logits, me, team):
    """``logits`` [n, vocab] of the ``rows`` [n] of ``x`` [T, hidden]."""
    for i in range(me, len(rows), team):
        _normalise(m, b, m.final_norm, x + 4 * rows[i] * m.hidden, i, m.head_kind)
    meet(b.sync, team)
    begin, end = _part(m.vocab, me, team)
    kind, inputs = m.head_kind, b.shorts if m.head_kind >= INT8 else b.inputs
    scales, middles, sums = m.head_scales, NONE, NONE
    n, k = len(rows), m.hidden
    multiply(kind, m.head, scales, middles, begin, end, inputs, b.row_scales, sums, n, k, logits, m.vocab)
    meet(b.sync, team)

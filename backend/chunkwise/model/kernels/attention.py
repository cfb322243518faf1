"""Causal attention over the paged cache, pages of every format alike; a small page is widened into a few kilobytes of
scratch when it is its turn, never the whole cache.

Keys are taken in stretches of `STRETCH` that start at multiples of it. A stretch is a softmax of its own; stretches are
merged by their maxima and sums (FlashAttention, arXiv 2205.14135). Since they lie at fixed positions, a token's result
is the same in whatever span it is computed.

A span of one token reads every key once and hardly computes, so its task is a stretch with all heads: pages are read
as they lie in memory, which is twice as fast as head by head. A longer span computes, and its task is a few tokens with
one head.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from chunkwise.model.kernels.compile import kernel
from chunkwise.model.kernels.lora import accumulate
from chunkwise.model.kernels.product import multiply_floats
from chunkwise.model.kernels.tiles import as_pointer, atomic_add, exp_sum
from chunkwise.model.kernels.views import (
    FULL_PAGE,
    INT8_PAGE,
    KEY_MIDDLES,
    KEY_SCALES,
    KEYS,
    PAGE_FORMATS,
    VALUE_MIDDLES,
    VALUE_SCALES,
    VALUES,
)
from chunkwise.model.kernels.widening import widen_keys_int4, widen_keys_int8, widen_values_int4, widen_values_int8

STRETCH = 128
"""Keys per stretch; a multiple of the page size."""
TASK_TOKENS = 4
"""Tokens that one task of a longer span takes."""
STATE = 4
"""Floats in front of a query's result: the maximum score, ``Σ w``, ``Σ w (score - maximum)`` with ``w = e^(score -
maximum)``, and one unused; the result itself is ``Σ w v``."""

# See `views.NONE`.
_ZERO, _ONE, _STRETCH = np.int64(0), np.int64(1), np.int64(STRETCH)


def tasks_of(tokens: int, context: int, kv_heads: int) -> int:
    """Tasks that a span is divided into."""
    return -(-context // STRETCH) if tokens == 1 else -(-tokens // TASK_TOKENS) * kv_heads


def scratch_floats(heads: int, kv_heads: int, head_dim: int, page_size: int) -> int:
    """Floats a thread needs: queries, running and new records, and scores of a task; a copy of scores; a page."""
    queries = max(heads, TASK_TOKENS * (heads // kv_heads))
    return queries * (head_dim + 2 * (STATE + head_dim) + STRETCH) + STRETCH + page_size * head_dim


@kernel
def _page(c, m, layer, head, page, keys, scratch):
    """Address of one head's keys (or values) in a page, ``[page, head_dim]``; in ``scratch``, widened, if small."""
    number, kind = divmod(page, PAGE_FORMATS)
    start = c.pools[kind] + number * c.strides[kind, 0] + layer * c.strides[kind, 1]
    part, dim = c.parts[kind], m.head_dim
    numbers = start + part[KEYS if keys else VALUES]
    if kind == FULL_PAGE:
        return numbers + 4 * head * c.page_size * dim
    first = head * (dim if keys else c.page_size)
    scales = start + part[KEY_SCALES if keys else VALUE_SCALES]
    middles = start + part[KEY_MIDDLES if keys else VALUE_MIDDLES]
    if kind == INT8_PAGE:
        numbers += head * c.page_size * dim
        if keys:
            widen_keys_int8(numbers, c.page_size, dim, scales + 4 * first, 0, scratch)
        else:
            widen_values_int8(numbers, c.page_size, dim, scales + 4 * first, 0, scratch)
        return scratch
    numbers += head * c.page_size * dim // 2
    if keys:
        widen_keys_int4(numbers, c.page_size, dim, scales + 2 * first, middles + 2 * first, scratch)
    else:
        widen_values_int4(numbers, c.page_size, dim, scales + 2 * first, middles + 2 * first, scratch)
    return scratch


@kernel
def _gather_queries(m, b, row, tokens, first_head, last_head, queries):
    """The queries of some KV heads, head by head and token by token, times 1/√head_dim."""
    dim = m.head_dim
    width = m.heads // m.kv_heads * dim
    scale = np.float32(1.0 / math.sqrt(dim))
    for head in range(first_head, last_head):
        for t in range(tokens):
            source = carray(as_pointer(b.wide + 4 * ((row + t) * m.outs[0] + head * width)), width, np.float32)
            place = (head - first_head) * tokens + t
            target = carray(as_pointer(queries + 4 * place * width), width, np.float32)
            for i in range(width):
                target[i] = source[i] * scale


@kernel
def _weigh(scores, record, valid, keys, copy, signals):
    """Turns one query's scores of a stretch into weights; those from ``valid`` on count nothing."""
    row = carray(as_pointer(scores), keys, np.float32)
    state = carray(as_pointer(record), STATE, np.float32)
    maximum = np.float32(-np.inf)
    for i in range(valid):
        maximum = max(maximum, row[i])
    for i in range(valid, keys):
        row[i] = np.float32(0.0)
    state[0], state[1], state[2] = maximum, np.float32(0.0), np.float32(0.0)
    if valid == 0:
        return
    kept = carray(as_pointer(copy), keys, np.float32)
    if signals:
        for i in range(valid):
            kept[i] = row[i] - maximum
    state[1] = exp_sum(scores, valid, record)
    if signals:
        term = np.float32(0.0)
        for i in range(valid):
            term += row[i] * kept[i]
        state[2] = term


@kernel
def _merge(record, new, dim):
    """Adds the record of a later stretch to a record."""
    old, late = carray(as_pointer(record), STATE + dim, np.float32), carray(as_pointer(new), STATE + dim, np.float32)
    top = max(old[0], late[0])
    keep, take = np.float32(math.exp(old[0] - top)), np.float32(math.exp(late[0] - top))
    old_term = old[2] + (old[0] - top) * old[1]
    late_term = late[2] + (late[0] - top) * late[1]
    old[0], old[1], old[2] = top, old[1] * keep + late[1] * take, old_term * keep + late_term * take
    for d in range(STATE, STATE + dim):
        old[d] = old[d] * keep + late[d] * take


@kernel
def _attend(m, s, c, layer, sequence, position, tokens, heads, start, records, queries, scores):
    """One stretch from position ``start`` on: fills the records of ``tokens`` tokens, the first at ``position``, for
    the KV heads ``heads[0]`` to ``heads[1]``."""
    group, dim = m.heads // m.kv_heads, m.head_dim
    n = tokens * group
    size = 4 * (STATE + dim)
    copy = scores + 4 * (heads[1] - heads[0]) * n * STRETCH
    page_floats = copy + 4 * STRETCH
    keys = min(start + STRETCH, position + tokens) - start
    first = s.first_page[sequence] + start // c.page_size
    pages = (keys + c.page_size - 1) // c.page_size
    for i in range(pages):
        count = min(c.page_size, keys - i * c.page_size)
        for head in range(heads[0], heads[1]):
            q = (head - heads[0]) * n
            at = _page(c, m, layer, head, s.pages[first + i], True, page_floats)
            to = scores + 4 * (q * STRETCH + i * c.page_size)
            multiply_floats(at, _ZERO, count, queries + 4 * q * dim, n, dim, to, _STRETCH)
    for q in range((heads[1] - heads[0]) * n):
        token = q % n // group
        valid = min(max(position + token + 1 - start, 0), keys)
        signals = m.signal[layer] >= 0 and heads[0] == 0 and q == n - group
        record = records + q * size
        _weigh(scores + 4 * q * STRETCH, record, valid, keys, copy, signals)
        values = carray(as_pointer(record + 4 * STATE), dim, np.float32)
        for d in range(dim):
            values[d] = np.float32(0.0)
    for i in range(pages):
        count = min(c.page_size, keys - i * c.page_size)
        for head in range(heads[0], heads[1]):
            q = (head - heads[0]) * n
            at = _page(c, m, layer, head, s.pages[first + i], False, page_floats)
            weights = scores + 4 * (q * STRETCH + i * c.page_size)
            accumulate(n, weights, _STRETCH, at, dim, count, records + q * size + 4 * STATE, STATE + dim, dim)


@kernel
def _finish(m, b, s, layer, sequence, row, tokens, first_head, last_head, context, records):
    """Writes the results of a task to ``inputs``, and the attention spread if it holds the first head's last query."""
    group, dim = m.heads // m.kv_heads, m.head_dim
    n = tokens * group
    for q in range((last_head - first_head) * n):
        record = carray(as_pointer(records + 4 * q * (STATE + dim)), STATE + dim, np.float32)
        place = (first_head + q // n) * group + q % group
        target = b.inputs + 4 * ((row + q % n // group) * m.heads + place) * dim
        out = carray(as_pointer(target), dim, np.float32)
        for d in range(dim):
            out[d] = record[STATE + d] / record[1]
    if m.signal[layer] >= 0 and first_head == 0 and context == s.contexts[sequence]:
        state = carray(as_pointer(records + 4 * (n - group) * (STATE + dim)), STATE, np.float32)
        spread = carray(as_pointer(b.spread + 4 * (m.signal[layer] * s.sequences + sequence)), 1, np.float32)
        spread[0] = (math.log(state[1]) - state[2] / state[1]) / math.log(max(context, 2))


@kernel
def _long_task(m, b, s, c, layer, sequence, task, scratch):
    """A few tokens of a longer span with one KV head, stretch after stretch."""
    block, head = divmod(task, m.kv_heads)
    row = s.first_row[sequence] + block * TASK_TOKENS
    tokens = min(TASK_TOKENS, s.first_row[sequence] + s.lengths[sequence] - row)
    position = s.contexts[sequence] - s.lengths[sequence] + block * TASK_TOKENS
    dim = m.head_dim
    n, size = tokens * (m.heads // m.kv_heads), 4 * (STATE + dim)
    records = scratch + 4 * n * dim
    new = records + n * size
    scores = new + n * size
    _gather_queries(m, b, row, tokens, head, head + 1, scratch)
    for start in range(0, position + tokens, STRETCH):
        to = records if start == 0 else new
        _attend(m, s, c, layer, sequence, position, tokens, (head, head + 1), start, to, scratch, scores)
        if start > 0:
            for q in range(n):
                # A token before the stretch has nothing in it.
                if position + q // (m.heads // m.kv_heads) >= start:
                    _merge(records + q * size, new + q * size, dim)
    _finish(m, b, s, layer, sequence, row, tokens, head, head + 1, position + tokens, records)


@kernel
def _single_task(m, b, s, c, layer, sequence, stretch, scratch):
    """One stretch of a span of one token, all heads; `join` puts the stretches together."""
    position = s.contexts[sequence] - 1
    row, dim = s.first_row[sequence], m.head_dim
    _gather_queries(m, b, row, _ONE, _ZERO, m.kv_heads, scratch)
    records = b.records + 4 * (s.first_record[sequence] + stretch) * m.heads * (STATE + dim)
    scores = scratch + 4 * m.heads * dim
    _attend(m, s, c, layer, sequence, position, _ONE, (_ZERO, m.kv_heads), stretch * STRETCH, records, scratch, scores)


@kernel
def attend(m, b, s, c, layer, me):
    """Attention of all rows; each thread takes the next task that nobody has. Leaves the results of longer spans in
    ``inputs``, those of single tokens in ``records``."""
    scratch = b.scratch + 4 * me * b.scratch_floats
    tasks = s.first_task[s.sequences]
    sequence = 0
    while True:
        task = atomic_add(b.tickets + 8 * layer, 1)
        if task >= tasks:
            return
        while task >= s.first_task[sequence + 1]:
            sequence += 1
        task -= s.first_task[sequence]
        if s.lengths[sequence] == 1:
            _single_task(m, b, s, c, layer, sequence, task, scratch)
        else:
            _long_task(m, b, s, c, layer, sequence, task, scratch)


@kernel
def join(m, b, s, layer, sequence):
    """Joins the stretches of a span of one token and writes its result to ``inputs``."""
    dim = m.head_dim
    size = 4 * (STATE + dim)
    records = b.records + s.first_record[sequence] * m.heads * size
    for stretch in range(1, s.first_record[sequence + 1] - s.first_record[sequence]):
        for head in range(m.heads):
            _merge(records + head * size, records + (stretch * m.heads + head) * size, dim)
    _finish(m, b, s, layer, sequence, s.first_row[sequence], _ONE, _ZERO, m.kv_heads, s.contexts[sequence], records)

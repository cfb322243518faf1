"""What the kernels are told: addresses, sizes and small integer tables, as named tuples that numba code can read.

Addresses are integers; the owner of the memory (`model.kernel_decoder`) keeps it alive for as long as a kernel runs.
All matrices are row-major and contiguous, all floats fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

QKV, OUTPUT, GATE_UP, DOWN = (np.int64(number) for number in range(4))
"""The four projections of a layer: targets that share an input are one matrix."""
FLOAT32, BFLOAT16, INT8, INT4 = (np.int64(number) for number in range(4))
"""How base matrices are stored; from `INT8` on they are multiplied with activations in 16 bits."""
NONE = np.int64(0)
"""The address of what is not there. numba compiles a function anew for every Python integer that it is called with, but
once for all numbers of this type."""
FULL_PAGE, INT8_PAGE, INT4_PAGE = range(3)
"""How KV pages are stored."""
PAGE_FORMATS = 4
"""A page is its number times this, plus its format."""
KEYS, VALUES, KEY_SCALES, VALUE_SCALES, KEY_MIDDLES, VALUE_MIDDLES = range(6)
"""Parts of a page."""
TARGETS = 7
"""LoRA targets of a layer, in the order q, k, v, o, gate, up, down."""


class ModelView(NamedTuple):
    """One rank's weights. ``weights``, ``scales``, ``middles`` and ``biases`` are addresses ``[layers, 4]``, of
    matrices of ``kind`` and their fp32 scales if that is `INT8` or `INT4`, fp16 middles if `INT4`; a bias of 0 is none.
    ``norms`` ``[layers, 2]`` are addresses. ``outs`` and ``ins`` ``[4]`` are the projections' sizes; ``first_target``
    ``[5]`` and ``columns`` ``[7, 2]`` say which LoRA targets make which columns. ``embedding`` and ``head``, both of
    ``head_kind``, hold the ``vocab`` tokens from ``first_id`` on. ``signal`` ``[layers]`` numbers the layers that
    report attention spread, else it is -1.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    kind: int
    head_kind: int
    weights: Ints
    scales: Ints
    middles: Ints
    biases: Ints
    norms: Ints
    outs: Ints
    ins: Ints
    first_target: Ints
    columns: Ints
    signal: Ints
    final_norm: int
    embedding: int
    embedding_scales: int
    first_id: int
    head: int
    head_scales: int
    cos: int
    sin: int


class CacheView(NamedTuple):
    """The KV pools (see `kv.pools`) by format, in bytes: where page 0 begins, ``pools``; from page to page and from
    layer to layer, ``strides`` ``[formats, 2]``; from a layer's beginning to its parts, ``parts`` ``[formats, 6]``, in
    the order `KEYS` to `VALUE_MIDDLES`."""

    page_size: int
    pools: Ints
    strides: Ints
    parts: Ints


class StepView(NamedTuple):
    """One step of ``tokens`` rows of ``sequences`` sequences.

    Sequence s has rows ``first_row[s]`` on, ``lengths[s]`` of them, the last being its ``contexts[s]``-th; its pages
    are ``pages[first_page[s]:]``, each as number · `PAGE_FORMATS` + format. ``contexts`` and ``slots`` count tokens
    that are kept, ``positions`` all that there were. ``first_task`` and ``first_record`` ``[S + 1]`` number its
    attention tasks and the records they leave.

    LoRA group g has rows ``rows[first_member[g]:first_member[g + 1]]``, consecutive if ``consecutive[g]``, all of gate
    1 at the group's rung if ``plain[g]``. ``a`` and ``b`` ``[groups, layers · 7]`` are the addresses of its factors,
    ``ranks`` of the same shape the active ranks at its widest rung. Member i has ``weight[i]`` up to the rank
    ``rung_ranks[g, rung[i]]`` and ``previous_weight[i]`` up to that of ``previous_rung[i]``.
    """

    tokens: int
    sequences: int
    groups: int
    ids: Ints
    positions: Ints
    slots: Ints
    first_row: Ints
    lengths: Ints
    contexts: Ints
    first_page: Ints
    pages: Ints
    first_task: Ints
    first_record: Ints
    first_member: Ints
    rows: Ints
    consecutive: Ints
    plain: Ints
    a: Ints
    b: Ints
    ranks: Ints
    rung_ranks: NDArray[np.int64]
    rung: Ints
    weight: Floats
    previous_rung: Ints
    previous_weight: Floats


class BufferView(NamedTuple):
    """Working memory for up to as many rows as the step has.

    ``x`` [T, hidden] is the residual stream, ``inputs`` [T, widest in] what the next projection reads, ``shorts`` and
    ``row_scales`` the same in 16 bits and ``group_sums`` [T, ⌈in / 32⌉] its sums for 4 bits, ``wide`` [T, widest out],
    ``partial`` [T, hidden] what the residual stream is still to receive, ``shrunk`` [3, T, ``rank``] the gated shrink
    outputs of the targets of one projection, ``scratch`` [threads, ``scratch_floats``] (an attention task's, or as many
    as the widest out), ``records`` one per head and
    attention task of a single token (see `attention.STATE`). ``sync`` holds the arrivals at the barrier, ``tickets``
    [layers] the attention tasks taken. ``spread`` [signal layers, S]; in the end its first row is their mean.
    """

    x: int
    inputs: int
    shorts: int
    row_scales: int
    group_sums: int
    wide: int
    partial: int
    shrunk: int
    rows: int
    rank: int
    scratch: int
    scratch_floats: int
    records: int
    sync: int
    tickets: int
    spread: int

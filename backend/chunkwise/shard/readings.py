"""What the raw next-token logits of a step say, all rows at once: the likeliest tokens and how certain they are."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numba import carray
from torch import Tensor

from chunkwise.model.kernels.compile import entry, kernel
from chunkwise.model.kernels.tiles import as_pointer, exp_sum

# Floats that are worked on at a time; they stay in the first-level cache.
_STRETCH = 4096
# Without the sign bit, the bits of a float that is not finite are those of infinity, or more.
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
# `exp_sum` never gives quite 0; further away than this, what it gives would count if it were not for this bound.
_FAR = np.float32(-100.0)


@dataclass(frozen=True, slots=True)
class Readings:
    """Row by row: ``entropies`` over ln V, so in [0, 1], NaN where a logit is not finite; the ``likeliest`` tokens, of
    several the first; their ``logprobs``."""

    entropies: list[float]
    likeliest: list[int]
    logprobs: list[float]


def read_logits(logits: Tensor) -> Readings:
    """The readings of raw ``logits`` [S, V], fp32. A row's are the same whatever rows are beside it."""
    return _read_by_kernel(logits) if logits.device.type == "cpu" else read_by_torch(logits)


def read_by_torch(logits: Tensor) -> Readings:
    """The reference of the CPU kernel, and what runs on every other device."""
    log_p = logits.log_softmax(dim=-1)
    ids = log_p.argmax(dim=-1)
    entropies = torch.linalg.vecdot(log_p.exp(), log_p) / -math.log(logits.shape[-1])
    return Readings(entropies.tolist(), ids.tolist(), log_p.gather(1, ids[:, None])[:, 0].tolist())


def _read_by_kernel(logits: Tensor) -> Readings:
    logits = logits.contiguous()
    rows, vocab = logits.shape
    ids, logprobs, entropies = np.empty(rows, np.int64), np.empty(rows), np.empty(rows)
    _read(logits.data_ptr(), rows, vocab, np.empty(_STRETCH, np.float32), ids, logprobs, entropies)
    return Readings((entropies / math.log(vocab)).tolist(), ids.tolist(), logprobs.tolist())


@entry
def _read(logits, rows, vocab, scratch, ids, logprobs, entropies):
    """Reads every row twice, for its maximum and for its sums, at the speed of memory."""
    for row in range(rows):
        start = logits + 4 * row * vocab
        id, finite = _likeliest(start, vocab)
        mass, moment = _sums(start, vocab, start + 4 * id, scratch)
        ids[row] = id
        logprobs[row] = -math.log(mass)
        entropies[row] = math.log(mass) - moment / mass if finite else math.nan


@kernel
def _likeliest(start, n):
    """The first of the largest of n floats, and whether all are finite. Compares bits as integers, since compilers do
    not vectorise the maximum of floats that may be NaN: with the other bits of negative floats turned over, integers
    are in the same order."""
    best, stretch, largest = np.int32(-(2**31)), 0, np.int32(0)
    for first in range(0, n, _STRETCH):
        bits = carray(as_pointer(start + 4 * first), min(_STRETCH, n - first), np.int32)
        high = np.int32(-(2**31))
        for i in range(len(bits)):
            high = max(high, np.int32(bits[i] ^ ((bits[i] >> 31) & _MAGNITUDE)))
            largest = max(largest, np.int32(bits[i] & _MAGNITUDE))
        if high > best:
            best, stretch = high, first
    bits = carray(as_pointer(start + 4 * stretch), n - stretch, np.int32)
    wanted, i = np.int32(best ^ ((best >> 31) & _MAGNITUDE)), 0
    while bits[i] != wanted:
        i += 1
    return stretch + i, largest < _INFINITY


@kernel
def _sums(start, n, top, scratch):
    """``Σ e^d`` and ``Σ d e^d`` over the distances d of n floats to the one at ``top``."""
    mass, moment = 0.0, 0.0
    shift = carray(as_pointer(top), 1, np.float32)[0]
    for first in range(0, n, _STRETCH):
        x = carray(as_pointer(start + 4 * first), min(_STRETCH, n - first), np.float32)
        for i in range(len(x)):
            scratch[i] = x[i]
        mass += exp_sum(scratch.ctypes.data, len(x), top)
        part = np.float32(0.0)
        for i in range(len(x)):
            part += scratch[i] * max(x[i] - shift, _FAR)
        moment += float(part)
    return mass, moment

"""The gated LoRA update as an obvious loop over tokens in fp64: the oracle of every faster version, not for serving."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunkwise_adapters.format import ModuleKey
from chunkwise_adapters.gate import LoraSegment


def gated_lora_(y: Tensor, x: Tensor, segments: Sequence[LoraSegment], key: ModuleKey) -> None:
    """Add the adapters' outputs of the module ``key`` to ``y``, in place.

    Semantics: ``y_t += B' (g_t ⊙ (A' x_t))`` for every token t of every segment, with the segment's adapter and gates.
    An adapter without this module adds nothing.

    Shapes: ``y`` [T, out_local], may be a view of columns of a wider tensor; ``x`` [T, in_local].
    """
    for segment in segments:
        module = segment.adapter.modules.get(key)
        if module is None:
            continue
        k = module.active_ranks[segment.rung]
        gates = segment.gate(module.active_ranks)
        for i, row in enumerate(torch.arange(len(y))[segment.rows].tolist()):
            h = module.a[:k].double() @ x[row].double()
            gated = h if gates is None else gates[i].double() * h
            y[row] += (module.b_t[:k].double().T @ gated).to(y.dtype)

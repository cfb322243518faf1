"""The same measurement in transformers: generation with a full cache, and with one that it quantises (hqq or quanto,
where installed)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

from chunkwise.evaluation.kv_service import Service, peak_bytes, resident_now, restart_peak

_ROWS = 128
"""Logits made at a time."""


def rival_cache(model: Any, backend: str | None) -> Any:
    """transformers' own cache: full, or of 4 bits in groups of 64 with the last 128 tokens full, its defaults."""
    if backend is None:
        return DynamicCache(config=model.config)
    return QuantizedCache(backend, model.config, nbits=4)


@torch.inference_mode()
def serve_with_transformers(
    model_dir: Path, backend: str | None, prompts: Sequence[tuple[int, ...]], step_tokens: int, new_tokens: int
) -> Service:
    """As `kv_service.serve`, of prompts of one length, read in pieces of ``step_tokens`` tokens over all prompts."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = torch.tensor(prompts)
    model(ids[:, :2])
    before, cache, nll = restart_peak(), rival_cache(model, backend), 0.0
    started, pieces = time.perf_counter(), max(step_tokens // len(prompts), 1)
    for first in range(0, ids.shape[1], pieces):
        hidden = model.model(ids[:, first : first + pieces], past_key_values=cache).last_hidden_state
        nll += _nll(model, hidden, ids[:, first + 1 : first + pieces + 1])
    prompt_seconds = time.perf_counter() - started
    resident, last, seconds = resident_now() - before, hidden[:, -1:], []
    for _ in range(new_tokens - 1):
        started = time.perf_counter()
        token = model.lm_head(last).argmax(dim=-1)
        last = model.model(token, past_key_values=cache).last_hidden_state
        seconds.append(time.perf_counter() - started)
    return Service(
        held={},
        held_bytes=_cache_bytes(cache),
        held_peak=0,
        resident=resident,
        resident_peak=peak_bytes() - before,
        nll=nll / (ids.shape[0] * (ids.shape[1] - 1)),
        prompt_seconds=prompt_seconds,
        decode_ms=1e3 * statistics.median(seconds),
    )


def _nll(model: Any, hidden: Tensor, following: Tensor) -> float:
    """Of the tokens that follow those whose hidden states are given, summed."""
    rows, wanted = hidden[:, : following.shape[1]].flatten(0, 1), following.flatten()
    total = 0.0
    for first in range(0, len(wanted), _ROWS):
        logits = model.lm_head(rows[first : first + _ROWS])
        total += float(torch.nn.functional.cross_entropy(logits, wanted[first : first + _ROWS], reduction="sum"))
    return total


def _cache_bytes(cache: Any) -> int:
    """Bytes of a cache's plain tensors; what a library packs away does not show here."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

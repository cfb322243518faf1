"""The limits of serving: what is asked of the shards in Warmup, and what their answer means. Does no IO."""

from __future__ import annotations

from dataclasses import replace

from chunkwise.config.settings import Limits
from chunkwise.core import GenerationRequest, SamplingParams, ShardInfo, StoppingParams, UnsupportedModel, WarmupLimits
from chunkwise.router.backlog import Capacity

# Two cores take one to two seconds over so many tokens of a small model, and every running answer waits meanwhile.
_CPU_STEP_TOKENS = 512


def warmup_prompt(limits: Limits) -> GenerationRequest:
    """The largest prompt that one step may hold, as one request, with the parameters that TGI's router gives it."""
    tokens = min(limits.step_tokens, limits.max_input_tokens or limits.step_tokens)
    return GenerationRequest(
        id=0,
        inputs="_test " * tokens,
        truncate=tokens,
        sampling=SamplingParams(
            temperature=0.9, top_k=10, top_p=0.9, typical_p=0.9, repetition_penalty=1.2, frequency_penalty=0.1
        ),
        stopping=StoppingParams(max(1, (limits.max_total_tokens or 0) - tokens), ignore_eos=True),
        top_n_tokens=20,
    )


def fit_limits(limits: Limits, info: ShardInfo) -> Limits:
    """The limits with the step's budget chosen for the device, if nobody did, and cut to the longest sequence that the
    model can take, as TGI's launcher does."""
    unset = limits.max_batch_prefill_tokens is None
    tokens = _CPU_STEP_TOKENS if unset and info.device_type == "cpu" else limits.step_tokens
    return replace(limits, max_batch_prefill_tokens=min(tokens, info.max_position_embeddings or tokens))


def usable_limits(limits: Limits, answer: WarmupLimits, info: ShardInfo) -> WarmupLimits:
    """The limits to serve under: the cache in whole pages, and what nobody asked for cut to what it can hold.

    Raises:
        UnsupportedModel: a limit that was asked for was not granted, or cannot be kept.
    """
    supported = answer.max_supported_total_tokens // info.page_size * info.page_size
    max_total = answer.max_total_tokens if limits.max_total_tokens else min(answer.max_total_tokens, supported)
    max_input = answer.max_input_tokens if limits.max_input_tokens else min(answer.max_input_tokens, max_total - 1)
    for name, wanted, granted in (
        ("max_input_tokens", limits.max_input_tokens, max_input),
        ("max_total_tokens", limits.max_total_tokens, max_total),
    ):
        if wanted is not None and wanted != granted:
            raise UnsupportedModel(f"{name} is {wanted} but the shards granted {granted}; set it to {granted}")
    if not 0 < max_input < max_total:
        raise UnsupportedModel(f"max_input_tokens is {max_input}; it must be at least 1 and below {max_total}")
    if max_total > supported:
        raise UnsupportedModel(
            f"max_total_tokens is {max_total} but the KV cache holds {supported} tokens in pages of {info.page_size}; "
            "lower max_total_tokens or give the cache more memory"
        )
    return WarmupLimits(max_input, max_total, supported)


def capacity_of(limits: Limits, usable: WarmupLimits, info: ShardInfo) -> Capacity:
    """What may run at once."""
    return Capacity(
        page_size=info.page_size,
        prefill_tokens=limits.step_tokens,
        total_tokens=usable.max_supported_total_tokens,
        batch_size=limits.max_batch_size,
        growth_tokens=limits.kv_growth_reserve,
    )

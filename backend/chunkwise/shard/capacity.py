"""How many pages the KV cache gets, and the token limits that follow from it."""

from __future__ import annotations

from chunkwise.core import InvalidRequest, WarmupLimits
from chunkwise.model.llama import Llama
from chunkwise.shard.memory import free_bytes

# Share of the memory free at Warmup that the KV cache may take.
_KV_SHARE = {"cpu": 0.4, "cuda": 0.9}


def capacity_pages(tokens: int | None, page_bytes: int, page_size: int, model: Llama) -> int:
    """Full pages for ``tokens`` positions; with None for a share of the memory that is free now, which on CPU the ranks
    of one machine divide. At least 1."""
    if tokens is not None:
        return max(tokens // page_size, 1)
    share = _KV_SHARE[model.device.type] / (model.group.world_size if model.device.type == "cpu" else 1)
    return max(int(free_bytes(model.device) * share) // page_bytes, 1)


def agree_limits(
    pages: int, page_size: int, positions: int, max_input: int | None, max_total: int | None
) -> WarmupLimits:
    """The limits of serving with ``pages`` pages and a model of ``positions`` positions; None takes the largest.

    Raises:
        InvalidRequest: limits that contradict each other, the model or the cache.
    """
    supported = pages * page_size
    # A TGI router keeps one block for itself, so the longest request must leave one page spare.
    most = min(positions, supported - page_size)
    total = max_total if max_total is not None else most
    if total > most:
        raise InvalidRequest(
            f"max_total_tokens is {total}; the model has {positions} positions and the KV cache holds {supported} "
            f"tokens, one page of {page_size} spare; use at most {most} or raise --max-batch-total-tokens"
        )
    inputs = max_input if max_input is not None else total - 1
    if not 1 <= inputs < total:
        raise InvalidRequest(f"max_input_tokens is {inputs}; it must lie in 1..{total - 1}, below max_total_tokens")
    return WarmupLimits(inputs, total, supported)

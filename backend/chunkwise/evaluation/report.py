"""Records of a result file, and what they say together. The summary works from the records alone, so a finished file
can be summed up without running anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from chunkwise.evaluation.bootstrap import Interval, Metric, interval
from chunkwise.evaluation.jobs import Outcome
from chunkwise.evaluation.results import Record
from chunkwise.evaluation.task import Grade

_DECIMALS = 4


def record(outcome: Outcome, grade: Grade, pool_bytes_peak: int) -> Record:
    """The line of one item.

    ``tokens`` and ``rank_sums`` are pairs (prompt, answer): computed positions and the sum of their active ranks;
    ``rank_runs`` are (number of positions, active rank) from the first position on; ``chunks`` are (start, rung, scale,
    cross-fade window) as executed; ``kv_bytes`` is (mean, peak, end) of the item's own pages; ``pool_bytes_peak`` is
    the most that all pages took in any step of the item's group, prompts included.
    """
    trace, boundary = outcome.trace, outcome.job.boundary
    computed = trace.computed
    return {
        "id": outcome.job.key,
        **grade.details,
        "statistics": {name: list(sums) for name, sums in grade.statistics.items()},
        "tokens": [min(boundary, computed), max(computed - boundary, 0)],
        "rank_sums": [trace.rank_sum(0, boundary), trace.rank_sum(boundary, computed)],
        "rank_runs": [[count, round(rank, _DECIMALS)] for count, rank in trace.rank_runs],
        "chunks": [list(chunk) for chunk in trace.chunks],
        "kv_bytes": [trace.kv_bytes_mean, trace.kv_bytes_peak, trace.kv_bytes_end],
        "pool_bytes_peak": pool_bytes_peak,
    }


def summarize(records: Sequence[Record], metrics: Mapping[str, Metric], seed: int) -> dict[str, Any]:
    """Metrics with bootstrap intervals, tokens, mean active rank per computed position, and KV bytes held per item (the
    mean of the items' means, and the largest peak). What is undefined is None."""
    prompt, answer = (sum(r["tokens"][part] for r in records) for part in (0, 1))
    prompt_ranks, answer_ranks = (sum(r["rank_sums"][part] for r in records) for part in (0, 1))
    return {
        "metrics": {
            name: _interval(interval([r["statistics"][name] for r in records], metric, seed))
            for name, metric in metrics.items()
        },
        "items": len(records),
        "tokens": {"prompt": prompt, "answer": answer},
        "mean_active_rank": {
            "all": _quotient(prompt_ranks + answer_ranks, prompt + answer),
            "prompt": _quotient(prompt_ranks, prompt),
            "answer": _quotient(answer_ranks, answer),
        },
        "kv_bytes_per_item": {
            "mean": round(sum(r["kv_bytes"][0] for r in records) / len(records)),
            "peak": max(r["kv_bytes"][1] for r in records),
        },
    }


def _quotient(total: float, count: int) -> float | None:
    return round(total / count, _DECIMALS) if count else None


def _interval(value: Interval) -> dict[str, float | None]:
    bounds = {"value": value.value, "low": value.low, "high": value.high}
    return {name: None if math.isnan(bound) else round(bound, _DECIMALS) for name, bound in bounds.items()}

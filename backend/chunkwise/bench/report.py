"""Measured scenarios to rows, a table, and the targets they meet or miss. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chunkwise.bench.figures import agreement, summarise
from chunkwise.bench.measure import Measured
from chunkwise.bench.scenarios import OURS, STEERED

Row = dict[str, Any]

_Column = tuple[str, str, int]
_COLUMNS: tuple[_Column, ...] = (
    ("setting", "setting", 30),
    ("engine", "engine", 18),
    ("weights", "weights", 9),
    ("ttft_ms", "first ms", 10),
    ("gap_ms", "gap ms", 9),
    ("step_ms", "step ms", 9),
    ("decode_tok_s", "decode/s", 9),
    ("total_tok_s", "total/s", 9),
    ("mean_rank", "rank", 7),
    ("peak_rss_mb", "RSS MB", 8),
    ("others_cpu", "others", 8),
)
# Of streams that come and go there is no step time; what the slowest of them saw is the point.
_TRACE_COLUMNS: tuple[_Column, ...] = (
    *_COLUMNS[:3],
    ("ttft_ms", "first ms", 10),
    ("ttft_p90_ms", "90 %", 9),
    ("ttft_p99_ms", "99 %", 9),
    ("gap_ms", "gap ms", 9),
    ("gap_p90_ms", "90 %", 9),
    ("gap_p99_ms", "99 %", 9),
    *_COLUMNS[7:],
)


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio of two figures of one scenario, ``figure`` of our row over that of another row, and its bound: at most
    ``bound``, or at least, where ``at_least``. Rows are named by (setting, engine)."""

    scenario: str
    what: str
    figure: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    bound: float
    at_least: bool = False
    formats: tuple[str, ...] = ("float32", "bfloat16", "int8", "int4")


_FP32 = ("float32",)
_ONE, _EIGHT = ("1 adapter", OURS), ("8 adapters", OURS)
TARGETS = (
    Target(
        "single", "ms/token against transformers + PEFT", "gap_ms", _ONE, ("1 adapter", "peft"), 0.25, formats=_FP32
    ),
    Target("single", "ms/token against llama.cpp", "gap_ms", _ONE, ("1 adapter", "llama"), 1.05, formats=_FP32),
    Target("single", "ms/token against llama.cpp Q8_0", "gap_ms", _ONE, ("1 adapter", "llama"), 1.0, formats=("int8",)),
    Target(
        "single", "ms/token against the bandwidth limit", "gap_ms", _ONE, ("1 adapter", "limit"), 1.15, formats=_FP32
    ),
    Target(
        "single",
        "peak RSS against transformers + PEFT",
        "peak_rss_mb",
        _ONE,
        ("1 adapter", "peft"),
        0.75,
        formats=_FP32,
    ),
    Target(
        "mixed8", "tok/s against PEFT adapter_names", "decode_tok_s", _EIGHT, ("8 adapters", "peft"), 8, True, _FP32
    ),
    Target("mixed8", "tok/s against vLLM", "decode_tok_s", _EIGHT, ("8 adapters", "vllm"), 5, True, _FP32),
    Target("mixed8", "tok/s against llama.cpp, serial", "decode_tok_s", _EIGHT, ("8 adapters", "llama"), 3, True),
    Target("tax8", "ms/step, adapter over base", "step_ms", ("1 adapter for all", OURS), ("base", OURS), 1.10),
    Target("rank8", "ms/step, steered over full rank", "step_ms", ("8 adapters", STEERED), _EIGHT, 0.66),
    Target("cold", "time to first token, first use over again", "ttft_ms", ("first use", OURS), ("again", OURS), 2.0),
)


def rows(measured: Mapping[str, Measured], formats: Mapping[str, str]) -> list[Row]:
    """One row per engine and setting. ``agrees`` is the share of tokens equal to the first engine's, up to each
    stream's first difference: engines that give other answers are not doing the same work.
    ``others_cpu`` is the largest share of the machine, 0..1, that other processes had in any of its rounds."""
    result: list[Row] = []
    for engine, each in measured.items():
        total = round(sum(each.peak_bytes.values()) / 1e6)
        for setting, rounds in each.results.items():
            first = next(other.results[setting] for other in measured.values() if setting in other.results)
            row: Row = {"setting": setting, "engine": engine, "weights": formats[engine]}
            row |= {name: _rounded(value) for name, value in summarise(rounds).items() if value is not None}
            row["agrees"] = round(agreement(first[-1], rounds[-1]), 3)
            row["others_cpu"] = round(max(each.others[setting]), 3)
            if total:
                row["peak_rss_mb"] = total
                row["peak_rss_mb_by_process"] = {name: round(size / 1e6) for name, size in each.peak_bytes.items()}
            row["rounds"] = len(rounds)
            result.append(row)
    return result


def limit_row(setting: str, weight_bytes: int, bytes_per_second: float) -> Row:
    """The decode step of one stream as the time to read its weights once."""
    ms = _rounded(1000 * weight_bytes / bytes_per_second)
    return {"setting": setting, "engine": "limit", "gap_ms": ms, "step_ms": ms}


def check_targets(scenario: str, rows: Sequence[Row], ours: str) -> list[Row]:
    """The scenario's targets for our weight format ``ours`` whose two figures are there."""
    by_name = {(row["setting"], row["engine"]): row for row in rows}
    checked = []
    for target in TARGETS:
        if target.scenario != scenario or ours not in target.formats:
            continue
        left = by_name.get(target.ours, {}).get(target.figure)
        right = by_name.get(target.theirs, {}).get(target.figure)
        if left is None or right is None:
            continue
        ratio = left / right
        checked.append(
            {
                "scenario": scenario,
                "what": target.what,
                "ratio": round(ratio, 3),
                "bound": f"{'>=' if target.at_least else '<='} {target.bound:g}",
                "met": ratio >= target.bound if target.at_least else ratio <= target.bound,
            }
        )
    return checked


def table(name: str, rows: Sequence[Row]) -> str:
    """Rows as text, with the figures that most scenarios share; those of the trace with percentiles."""
    columns = _TRACE_COLUMNS if name == "trace" else _COLUMNS
    lines = [f"\n{name}", "".join(f"{title:<{width}}" for _, title, width in columns)]
    for row in rows:
        lines.append("".join(f"{row.get(key, ''):<{width}}" for key, _, width in columns).rstrip())
    return "\n".join(lines)


def _rounded(value: float) -> float:
    return round(value, 1 if value >= 100 else 2)

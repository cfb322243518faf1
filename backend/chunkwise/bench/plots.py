"""PNG files from the bench's document: bars per scenario, and the times of the replayed trace. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

# Drawn to files only; a machine without a display must do.
matplotlib.use("Agg")

_FIGURE_OF = {
    "single": ("gap_ms", "milliseconds per token"),
    "mixed8": ("decode_tok_s", "tokens per second, decoding"),
    "zipf32": ("decode_tok_s", "tokens per second, decoding"),
    "prefill1k": ("ttft_ms", "milliseconds to the first token"),
    "tax8": ("step_ms", "milliseconds per step"),
    "rank8": ("step_ms", "milliseconds per step"),
    "cold": ("ttft_ms", "milliseconds to the first token"),
}
_COLOURS = {"chunkwise": "#c0392b", "chunkwise steered": "#e08e45", "limit": "#b0b0b0"}
_RIVAL = "#4a6fa5"
_SHARES = (("", "median"), ("_p90", "90 %"), ("_p99", "99 %"))


def draw(document: dict[str, Any], directory: Path) -> list[Path]:
    """One file for every scenario of the document that has rows; returns their paths."""
    paths = []
    for name, scenario in document["scenarios"].items():
        if not scenario["rows"]:
            continue
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        if name == "trace":
            _draw_percentiles(axes, scenario["rows"])
        else:
            _draw_bars(axes, scenario["rows"], *_FIGURE_OF[name])
        machine = document["machine"]
        axes.set_title(
            f"{name}: {document['model']}, {machine['cores']} cores, commit {machine['commit']}", fontsize=10
        )
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        paths.append(path)
    return paths


def _draw_bars(axes: Any, rows: list[dict[str, Any]], key: str, unit: str) -> None:
    shown = [row for row in rows if key in row]
    labels = [f"{row['engine']} ({row.get('weights', 'read once')})\n{row['setting']}" for row in shown]
    bars = axes.barh(labels, [row[key] for row in shown], color=[_COLOURS.get(row["engine"], _RIVAL) for row in shown])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", labelsize=8)


def _draw_percentiles(axes: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for figure in ("ttft", "gap"):
            values = [row[f"{figure}{suffix}_ms"] for suffix, _ in _SHARES]
            what = "to the first token" if figure == "ttft" else "between tokens"
            axes.plot([label for _, label in _SHARES], values, marker="o", label=f"{row['engine']}, {what}")
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize=8)

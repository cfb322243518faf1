"""The picture of an experiment. The only module of ``chunkwise experiments`` that needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chunkwise.evaluation.experiments.report import Panel, Series

_COLUMNS = 2
_RANKS = (0, 0.25, 0.5, *(1 << i for i in range(11)))


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Writes a PNG with the panels side by side, in rows of two.

    Raises:
        OSError: the file cannot be written.
    """
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.5 * columns, 4.5 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for panel, place in zip(panels, axes, strict=False):
        place.set_title(panel.title, fontsize="medium")
        place.set_xlabel(panel.xlabel)
        place.set_ylabel(panel.ylabel)
        place.grid(alpha=0.3)
        (_draw_names if panel.names else _draw_curves)(place, panel)
    for spare in axes[len(panels) :]:
        spare.set_visible(False)
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Axes, panel: Panel) -> None:
    for series in panel.series:
        if all(math.isnan(y.value) for y in series.y):
            continue
        axes.errorbar(
            [float(x) for x in series.x],
            [y.value for y in series.y],
            yerr=_bars(series),
            label=series.label,
            marker="o",
            markersize=4,
            linestyle="-" if series.joined else "none",
            elinewidth=0.8,
        )
    if panel.rank_axis:
        axes.set_xscale("function", functions=(lambda x: np.log2(1 + np.maximum(x, -0.9)), lambda x: 2**x - 1))
        highest = max(x for series in panel.series for x in series.x)
        ticks = [tick for tick in _RANKS if tick <= highest]
        axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.legend(fontsize="small")


def _draw_names(axes: Axes, panel: Panel) -> None:
    for place, series in enumerate(panel.series):
        axes.errorbar([y.value for y in series.y], [place], xerr=_bars(series), marker="o", color="C0")
    axes.set_yticks(range(len(panel.series)), labels=[series.label for series in panel.series])
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.8)


def _bars(series: Series) -> list[list[float]]:
    """Lengths below and above each value; a percentile interval need not hold it."""
    return [
        [max(y.value - y.low, 0.0) for y in series.y],
        [max(y.high - y.value, 0.0) for y in series.y],
    ]

"""What an experiment gives: tables, panels of a plot, and the words above them; and the files they are written to."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chunkwise.evaluation.bootstrap import Interval
from chunkwise.evaluation.experiments.tables import Table


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one arm. ``joined`` draws a line through them."""

    label: str
    x: Sequence[float]
    y: Sequence[Interval]
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. With ``names``, each series is one interval beside its name, 0 is marked, and x is not used;
    ``rank_axis`` scales x as log2(1 + x)."""

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    rank_axis: bool = False
    names: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """``notes`` say what was run, one sentence each; ``tables`` go to files, ``shown`` (None: the same) to people."""

    notes: Sequence[str]
    tables: Sequence[Table]
    panels: Sequence[Panel]
    shown: Sequence[Table] | None = None

    def markdown(self, name: str) -> str:
        """The report for people."""
        tables = [table.markdown() for table in (self.tables if self.shown is None else self.shown)]
        return "\n\n".join([f"# {name}", "\n".join(self.notes), *tables]) + "\n"


def write_report(report: Report, name: str, out: Path) -> tuple[list[Path], str | None]:
    """Writes a CSV file per table, ``NAME.md`` with all, and ``NAME.png``; returns their paths, and why there is no
    plot if there is none."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{table.name}.csv" for table in report.tables]
    for path, table in zip(paths, report.tables, strict=True):
        path.write_text(table.csv(), encoding="utf-8")
    paths.append(out / f"{name}.md")
    paths[-1].write_text(report.markdown(name), encoding="utf-8")
    try:
        plots = importlib.import_module("chunkwise.evaluation.experiments.plots")
    except ModuleNotFoundError as error:
        return paths, f"no plot was drawn, it needs matplotlib ({error}): pip install 'chunkwise[plot]'"
    paths.append(out / f"{name}.png")
    plots.draw(report.panels, paths[-1])
    return paths, None

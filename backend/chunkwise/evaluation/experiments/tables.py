"""Tables of an experiment, as CSV for programs and Markdown for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from chunkwise.evaluation.bootstrap import Interval

Cell = str | int | float | Interval | None
_DIGITS, _SHOWN_DIGITS = 6, 4


@dataclass(frozen=True, slots=True)
class Table:
    """``name`` is the file's, if there is one; a column holds words, numbers or intervals; None and NaN are empty."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]

    def csv(self) -> str:
        """Numbers to six significant digits; a column of intervals becomes three: value, low and high."""
        spread = {index for row in self.rows for index, cell in enumerate(row) if isinstance(cell, Interval)}
        header: list[str] = []
        for index, column in enumerate(self.columns):
            header.append(column)
            if index in spread:
                header += [f"{column} low", f"{column} high"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for row in self.rows:
            writer.writerow([part for index, cell in enumerate(row) for part in _parts(cell, index in spread)])
        return text.getvalue()

    def markdown(self) -> str:
        """A title and the table; intervals stand in brackets behind their values."""
        lines = [_line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line([_shown(cell) for cell in row]) for row in self.rows]
        return f"**{self.title}**\n\n" + "\n".join(lines)


def _parts(cell: Cell, spread: bool) -> list[str]:
    if isinstance(cell, Interval):
        return [_number(bound, _DIGITS) for bound in (cell.value, cell.low, cell.high)]
    return [_plain(cell, _DIGITS), *([""] * 2 if spread else [])]


def _shown(cell: Cell) -> str:
    if not isinstance(cell, Interval):
        return _plain(cell, _SHOWN_DIGITS)
    value, low, high = (_number(bound, _SHOWN_DIGITS) for bound in (cell.value, cell.low, cell.high))
    return f"{value} [{low}, {high}]" if value else ""


def _plain(cell: str | int | float | None, digits: int) -> str:
    if cell is None or isinstance(cell, str):
        return cell or ""
    return _number(cell, digits)


def _number(number: float, digits: int) -> str:
    """Significant digits, without an exponent for what is neither huge nor tiny."""
    if isinstance(number, int) or math.isnan(number):
        return "" if isinstance(number, float) else str(number)
    return f"{number:.{digits}g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

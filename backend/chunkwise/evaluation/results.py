"""The result file of a run: JSON lines, a header that identifies the run, then one record per item in the data's order.

Records are written in whole groups of items that were computed together, so that a run that goes on after an
interruption computes the same groups, and its file is the same as if it had never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from chunkwise.core import ChunkwiseError

Record = Mapping[str, Any]


class ForeignResults(ChunkwiseError):
    """A result file that another run has written, or something else than a run."""


def _line(value: Record) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


class ResultFile:
    """Args:
    path: created with its folder if missing.
    header: everything the results depend on, as JSON values; never what they do not, such as paths.

    Raises:
        ForeignResults: the file has another header, or none.
    """

    def __init__(self, path: Path, header: Record) -> None:
        self._path = path
        self._header = json.loads(_line(header))
        self.records: list[Record] = []
        self._file: IO[str] | None = None
        if path.exists() and path.stat().st_size:
            self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def resume(self, sizes: Sequence[int]) -> int:
        """Opens the file for `append` and returns how many of the groups of ``sizes`` records it holds whole; records
        of a group that is not whole are dropped."""
        held = whole = 0
        for size in sizes:
            if held + size > len(self.records):
                break
            held += size
            whole += 1
        del self.records[held:]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if held == 0:
            self._path.write_text(_line(self._header), encoding="utf-8")
        else:
            self._cut(held + 1)
        self._file = self._path.open("a", encoding="utf-8")
        return whole

    def append(self, records: Sequence[Record]) -> None:
        """Writes the records of one group."""
        assert self._file is not None, "resume comes first"
        self._file.write("".join(_line(record) for record in records))
        self._file.flush()
        self.records.extend(records)

    def _cut(self, lines: int) -> None:
        """Shortens the file to its first ``lines`` lines."""
        with self._path.open("rb+") as file:
            for _ in range(lines):
                file.readline()
            file.truncate()

    def _read(self) -> None:
        # Behind the last line end stands nothing, or a line that was cut off while it was written.
        *complete, _ = self._path.read_bytes().split(b"\n")
        try:
            header, *self.records = [json.loads(line) for line in complete]
        except ValueError as error:
            raise ForeignResults(
                f"{self._path} is not a result file of chunkwise eval; name another file with --out"
            ) from error
        if header != self._header:
            raise ForeignResults(
                f"{self._path} holds the results of another run: {_difference(header, self._header)}; "
                "name another file with --out, or remove it"
            )


def _difference(theirs: Any, ours: Record) -> str:
    if not isinstance(theirs, dict):
        return "it has no header"
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} is {_short(theirs.get(name))}, not {_short(ours.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

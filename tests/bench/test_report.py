"""Rows and targets out of results written by hand, and the plots of a document."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkwise.bench.measure import Measured
from chunkwise.bench.report import TARGETS, check_targets, limit_row, rows, table
from chunkwise.bench.runners.protocol import RunResult, StreamResult
from chunkwise.bench.scenarios import OURS
from chunkwise.config.bench_flags import SCENARIOS

FORMATS = {OURS: "float32", "peft": "float32", "llama": "F32"}


def measured(gap_ms: float, peak: int, ids: list[int], setting: str = "1 adapter") -> Measured:
    times = [100 + gap_ms * index for index in range(len(ids))]
    result = RunResult([StreamResult(times, ids)], [[0]], {})
    return Measured({}, {setting: [result]}, {setting: [0.02]}, {"shard 1": peak, "router 2": 1_000_000})


def single() -> list[dict[str, object]]:
    engines = {
        OURS: measured(25, 499_000_000, [1, 2, 3, 4]),
        "peft": measured(100, 999_000_000, [1, 2, 3, 4]),
        "llama": measured(25, 1, [1, 2, 9, 9]),
    }
    return rows(engines, FORMATS)


def test_rows_carry_figures_memory_and_agreement() -> None:
    ours, peft, llama = single()
    assert (ours["gap_ms"], ours["ttft_ms"], ours["weights"]) == (25.0, 100.0, "float32")
    assert ours["peak_rss_mb"] == 500
    assert ours["peak_rss_mb_by_process"] == {"shard 1": 499, "router 2": 1}
    assert ours["others_cpu"] == 0.02
    assert (peft["agrees"], llama["agrees"]) == (1.0, 0.5)


def test_targets_are_ratios_with_their_verdict() -> None:
    found = {
        target["what"]: target
        for target in check_targets("single", [*single(), limit_row("1 adapter", 10**9, 5e10)], "float32")
    }
    peft = found["ms/token against transformers + PEFT"]
    assert (peft["ratio"], peft["bound"], peft["met"]) == (0.25, "<= 0.25", True)
    assert found["ms/token against llama.cpp"]["met"] is True
    assert found["ms/token against the bandwidth limit"]["ratio"] == 1.25
    assert found["ms/token against the bandwidth limit"]["met"] is False
    assert found["peak RSS against transformers + PEFT"]["ratio"] == 0.5


def test_a_target_without_its_rival_is_left_out() -> None:
    assert check_targets("single", [row for row in single() if row["engine"] == OURS], "float32") == []
    assert [t["what"] for t in check_targets("single", single(), "int8")] == ["ms/token against llama.cpp Q8_0"]


def test_every_target_belongs_to_a_scenario() -> None:
    assert {target.scenario for target in TARGETS} <= set(SCENARIOS)


def test_the_table_has_a_line_per_row() -> None:
    text = table("single", single())
    assert text.splitlines()[1].startswith("single")
    assert len(text.splitlines()) == 3 + 3


def test_the_trace_s_table_shows_percentiles() -> None:
    (row,) = rows({OURS: measured(25, 1, [1, 2, 3, 4], "replayed")}, FORMATS)
    _, head, line = table("trace", [row]).lstrip().splitlines()
    assert (head.count("90 %"), head.count("99 %"), head.count("step ms")) == (2, 2, 0)
    assert line.split()[:9] == ["replayed", OURS, "float32", *["100.0"] * 3, *["25.0"] * 3]


def test_plots_are_png_files(tmp_path: Path) -> None:
    plots = pytest.importorskip("chunkwise.bench.plots", reason="matplotlib is an extra", exc_type=ImportError)
    trace: dict[str, object] = {"engine": OURS, "setting": "replayed"}
    for figure in ("ttft", "gap"):
        trace |= {f"{figure}{suffix}_ms": 10.0 for suffix in ("", "_p90", "_p99")}
    document = {
        "model": "tiny",
        "machine": {"cores": 2, "commit": "abc"},
        "scenarios": {"single": {"rows": single()}, "trace": {"rows": [trace]}, "cold": {"rows": []}},
    }
    paths = plots.draw(document, tmp_path)
    assert [path.name for path in paths] == ["single.png", "trace.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)

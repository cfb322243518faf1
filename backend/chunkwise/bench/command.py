"""``chunkwise bench``: every scenario in turn, tables as they come, one JSON object as the last line."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from chunkwise.bench import machine, report
from chunkwise.bench.engines import Files, Garage
from chunkwise.bench.measure import Measured, Prompts, measure
from chunkwise.bench.models import count_parameters, endless_copy
from chunkwise.bench.scenarios import OURS, SCENARIO_OF, Scenario
from chunkwise.config.bench_flags import BenchSettings, InvalidBenchFlags, bench_settings
from chunkwise.tokenizer import Tokenizer

_BYTES_OF = {"float32": 4, "bfloat16": 2}


def run(args: argparse.Namespace) -> None:
    """Measures and reports. Raises InvalidBenchFlags, or UnsupportedModel for a model that cannot be served."""
    settings = bench_settings(args)
    plots = _plots() if settings.plot else None
    # Ended from outside, it must still wake and end the engines it has stopped.
    signal.signal(signal.SIGTERM, _leave)
    with ExitStack() as stack:
        work = settings.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chunkwise-bench-")))
        work.mkdir(parents=True, exist_ok=True)
        files = Files(endless_copy(settings.model_dir, work), work)
        garage = Garage(settings, files)
        for engine, reason in garage.left_out.items():
            _say(f"without {engine}: {reason}")
        document = _measure_all(settings, garage)
        if plots is not None and settings.plot is not None:
            settings.plot.mkdir(parents=True, exist_ok=True)
            document["plots"] = [str(path) for path in plots.draw(document, settings.plot)]
    print(json.dumps(document))


def _measure_all(settings: BenchSettings, garage: Garage) -> dict[str, Any]:
    document: dict[str, Any] = {
        "machine": machine.describe(),
        "model": settings.model_dir.name,
        "adapters": [str(path) for path in settings.adapters],
        "threads": settings.threads,
        "dtype": settings.dtype,
        "quantize": settings.server.quantize,
        "left_out": garage.left_out,
        "engines": {},
        "scenarios": {},
        "targets": [],
    }
    prompts = Prompts(Tokenizer(settings.model_dir))
    for name in settings.scenarios:
        _measure_one(name, settings, garage, prompts, document)
    for target in document["targets"]:
        verdict = "met" if target["met"] else "missed"
        print(f"{target['scenario']:<8}{target['what']:<45}{target['ratio']:>8} (target {target['bound']}): {verdict}")
    return document


def _measure_one(
    name: str, settings: BenchSettings, garage: Garage, prompts: Prompts, document: dict[str, Any]
) -> None:
    """Measures one scenario, prints its table and adds it to the document."""
    scenario = SCENARIO_OF[name](settings)
    bandwidths: list[float] = []
    measured = measure(
        scenario, garage, prompts, _say, lambda: bandwidths.append(machine.read_bandwidth(settings.threads))
    )
    bandwidth = statistics.median(bandwidths)
    rows = report.rows(measured, {engine: garage.format_of(engine) for engine in measured})
    if name == "single" and settings.server.quantize is None:
        rows += _limits(settings, bandwidth)
    print(report.table(name, rows), flush=True)
    document["scenarios"][name] = _scenario_json(scenario, measured, rows) | {"read_gb_s": round(bandwidth / 1e9, 1)}
    document["targets"] += report.check_targets(name, rows, garage.format_of(OURS))
    for engine, each in measured.items():
        if each.started:
            document["engines"][engine] = {key: each.started[key] for key in ("versions", "settings")}


def _scenario_json(scenario: Scenario, measured: dict[str, Measured], rows: list[report.Row]) -> dict[str, Any]:
    failures = {engine: each.failure for engine, each in measured.items() if each.failure is not None}
    starts = {engine: each.started.get("start_seconds") for engine, each in measured.items() if each.started}
    streams = {case.setting: len(case.streams) for case in scenario.cases if case.counts}
    return {"streams": streams, "start_seconds": starts, "failures": failures, "rows": rows}


def _limits(settings: BenchSettings, bandwidth: float) -> list[report.Row]:
    """What reading the weights once takes, for the base and with one adapter."""
    width = _BYTES_OF[settings.dtype]
    base = count_parameters(settings.model_dir) * width
    adapter = count_parameters(settings.adapters[0]) * width
    return [
        report.limit_row("base", base, bandwidth),
        report.limit_row("1 adapter", base + adapter, bandwidth),
    ]


def _plots() -> ModuleType:
    """Imported only when asked for, and before anything is measured; matplotlib is an extra."""
    try:
        return importlib.import_module("chunkwise.bench.plots")
    except ImportError as error:
        raise InvalidBenchFlags(f"--plot needs matplotlib ({error}); pip install 'chunkwise[plot]'") from error


def _leave(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

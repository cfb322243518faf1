"""``chunkwise experiments``: one experiment, to tables and a plot."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

from chunkwise.config.experiment_settings import ExperimentName, ExperimentSettings, experiment_settings
from chunkwise.evaluation.experiments import ablation, crossfade, kv, ranks
from chunkwise.evaluation.experiments.lab import Lab
from chunkwise.evaluation.experiments.report import Report, write_report

_EXPERIMENTS: dict[ExperimentName, Callable[[Lab, ExperimentSettings], Report]] = {
    "ablation": ablation.run,
    "crossfade": crossfade.run,
    "ranks": ranks.run,
    "policies": ranks.run_policies,
    "kv": kv.run,
}
_INTERRUPTED = 130


def run(args: argparse.Namespace) -> None:
    """Runs what the folder does not hold yet, writes the report and prints it; the last line is JSON."""
    settings = experiment_settings(args)
    start = time.perf_counter()
    try:
        report = _EXPERIMENTS[settings.name](Lab(settings.engine, settings.out), settings)
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again to go on in {settings.out}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    paths, why_no_plot = write_report(report, settings.name, settings.out)
    print(report.markdown(settings.name))
    if why_no_plot is not None:
        print(why_no_plot, file=sys.stderr)
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"experiment": settings.name, "files": [str(path) for path in paths], "seconds": seconds}))

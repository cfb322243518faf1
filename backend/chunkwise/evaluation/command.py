"""``chunkwise eval``: one model, adapter, mode and data set, to a result file and a summary."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from chunkwise.config.eval_settings import EvalSettings, Selection, TaskName, TaskSettings, eval_settings
from chunkwise.evaluation.bleu import BleuTask
from chunkwise.evaluation.driver import Evaluator, load_evaluator
from chunkwise.evaluation.identity import model_hash, run_header
from chunkwise.evaluation.modes import SteeringMode, parse_mode
from chunkwise.evaluation.perplexity import AnswerTask, TextTask
from chunkwise.evaluation.progress import open_progress
from chunkwise.evaluation.report import record, summarize
from chunkwise.evaluation.results import ResultFile
from chunkwise.evaluation.squad import SquadTask
from chunkwise.evaluation.task import Task
from chunkwise.hub import locate
from chunkwise.tokenizer import Tokenizer

_TASKS: dict[TaskName, Callable[[TaskSettings, Selection, Tokenizer], Task]] = {
    "wikitext": TextTask,
    "nll": AnswerTask,
    "squad": SquadTask,
    "bleu": BleuTask,
}
_INTERRUPTED = 130


def run(args: argparse.Namespace) -> None:
    """Evaluates; the last line on standard output is the summary as one JSON object."""
    settings = eval_settings(args)
    try:
        summary = evaluate(settings)
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again to go on with {settings.out}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    for name, bounds in summary["metrics"].items():
        print(f"{name:<26}{bounds['value']!s:>12}   95 % in [{bounds['low']}, {bounds['high']}]")
    print(json.dumps(summary))


def evaluate(settings: EvalSettings) -> dict[str, Any]:
    """Runs what the result file does not hold yet and returns the summary of all of it.

    Raises:
        ChunkwiseError: flags, data, model, adapter or result file that cannot be used, or an item that fails.
    """
    evaluator = load_evaluator(settings.engine)
    source = settings.engine.adapter
    adapter = evaluator.adapters[source.name] if source is not None else None
    mode = parse_mode(settings.mode, adapter)
    task = _TASKS[settings.task.name](settings.task, settings.selection, evaluator.tokenizer)
    model = model_hash(locate(settings.engine.model_id, None))
    header = run_header(settings, model, evaluator.dtype, adapter, mode, task.identity)
    with ResultFile(settings.out, header) as results:
        speed = run_task(evaluator, task, mode, results)
        return {
            "task": settings.task.name,
            "mode": mode.name,
            "adapter": source.name if source is not None and mode.adapter is not None else None,
            **summarize(results.records, task.metrics, settings.selection.seed),
            "this_run": speed,
            "out": str(settings.out),
        }


def run_task(evaluator: Evaluator, task: Task, mode: SteeringMode, results: ResultFile) -> Mapping[str, Any]:
    """Runs the groups of items that ``results`` lacks and appends their records; tells how fast it went."""
    groups = evaluator.groups(task.jobs)
    done = results.resume([len(group) for group in groups])
    progress = open_progress(len(task.jobs), len(results.records))
    start, tokens = time.perf_counter(), 0
    try:
        for group in groups[done:]:
            steps = len(evaluator.pool_bytes)
            outcomes = evaluator.run_group(group, mode)
            peak = max(evaluator.pool_bytes[steps:])
            results.append([record(outcome, task.grade(outcome), peak) for outcome in outcomes])
            tokens += sum(outcome.trace.computed for outcome in outcomes)
            progress.update(len(group))
    finally:
        progress.close()
    seconds = time.perf_counter() - start
    pool = evaluator.pool_bytes or [0]
    return {
        "items": sum(len(group) for group in groups[done:]),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "kv_pool_bytes": {"mean": round(sum(pool) / len(pool)), "peak": max(pool)},
    }

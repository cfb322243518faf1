"""The command on the tiny model: every task, interruption and resumption, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chunkwise.cli import main
from chunkwise.config.eval_settings import eval_settings
from chunkwise.config.flags import InvalidFlags, build_parser
from chunkwise.evaluation.command import evaluate
from chunkwise.evaluation.driver import Evaluator
from chunkwise.evaluation.jobs import Job, Outcome
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.results import ForeignResults
from conftest import TinyWorld

POLICY = """
[estimator]
gain = 6.0
[chunker]
min_length = 3
max_length = 8
[rank]
source = "complexity"
min_rank = 1
max_rank = 8
[kv]
kind = "int8"
when = "always"
sink_tokens = 4
recent_tokens = 8
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small data set per task, and a policy."""
    folder = tmp_path_factory.mktemp("data")
    questions = [
        {"id": f"q{n}", "context": f"The number is {n}.", "question": "Which?", "answers": [str(n)] if n % 2 else []}
        for n in range(9)
    ]
    pairs = [{"src": f"Number {n}.", "tgt": f"Le numéro {n}."} for n in range(5)]
    contents = {
        "wikitext": " It was the best of times, it was the worst of times. " * 6,
        "nll": "".join(json.dumps(row) + "\n" for row in questions),
        "bleu": "".join(json.dumps(row) + "\n" for row in pairs),
        "policy": POLICY,
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return {name: folder / name for name in contents} | {"squad": folder / "nll"}


def flags(tiny: TinyWorld, data: dict[str, Path], task: str, out: Path, *more: str) -> list[str]:
    return [
        "eval",
        f"--model-id={tiny.model}",
        f"--adapter=a16={tiny.adapters['a16']}",
        f"--task={task}",
        f"--data={data[task]}",
        f"--out={out}",
        "--threads=1",
        "--batch-tokens=320",
        "--window=64",
        "--stride=32",
        "--max-new-tokens=12",
        *more,
    ]


def run(arguments: Sequence[str]) -> dict[str, Any]:
    return evaluate(eval_settings(build_parser({}).parse_args(arguments)))


@pytest.mark.parametrize("task", ["wikitext", "nll", "squad", "bleu"])
def test_every_task_under_a_policy(
    tiny: TinyWorld, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    out = tmp_path / "out.jsonl"
    main(flags(tiny, data, task, out, f"--mode=policy={data['policy']}"))
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    header, *records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert (header["task"], header["mode"], header["policy"]["rank"]["min_rank"]) == (task, "policy", 1)
    assert summary["items"] == len(records) > 1
    assert "items" in captured.err or "item" in captured.err
    name, metric = next(iter(summary["metrics"].items()))
    assert metric["low"] <= metric["value"] <= metric["high"], name
    tokens, ranks = (sum(sum(record[field]) for record in records) for field in ("tokens", "rank_sums"))
    assert tokens == sum(summary["tokens"].values()) == sum(n for record in records for n, _ in record["rank_runs"])
    assert summary["mean_active_rank"]["all"] == pytest.approx(ranks / tokens, abs=1e-4)
    assert 0 < summary["mean_active_rank"]["all"] < 16
    assert 0 < summary["kv_bytes_per_item"]["mean"] <= summary["kv_bytes_per_item"]["peak"]


def test_an_interrupted_run_goes_on_to_the_same_file(
    tiny: TinyWorld,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = (f"--mode=policy={data['policy']}", "--limit=8")
    whole = run(flags(tiny, data, "squad", tmp_path / "whole", *more))
    calls = 0
    real = Evaluator.run_group

    def interrupted(self: Evaluator, jobs: Sequence[Job], mode: SteeringMode) -> list[Outcome]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyboardInterrupt
        return real(self, jobs, mode)

    arguments = flags(tiny, data, "squad", tmp_path / "parts", *more)
    monkeypatch.setattr(Evaluator, "run_group", interrupted)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch.setattr(Evaluator, "run_group", real)
    part = (tmp_path / "parts").read_bytes()
    # And a line that was being written when the machine went down.
    (tmp_path / "parts").write_bytes(part + b'{"id": "q')
    resumed = run(arguments)
    assert 0 < resumed["this_run"]["items"] < whole["this_run"]["items"] == 8
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "whole").read_bytes().startswith(part)
    assert {**resumed, "this_run": 0, "out": 0} == {**whole, "this_run": 0, "out": 0}
    finished = run(arguments)
    assert (finished["this_run"]["items"], finished["metrics"]) == (0, whole["metrics"])


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--mode=rung=4",), "mode is"),
        (("--limit=3",), "limit is null, not 3"),
        (("--seed=5",), "seed is 0, not 5"),
        (("--max-new-tokens=7",), "max_new_tokens is 12, not 7"),
    ],
)
def test_the_file_of_another_run_is_refused(
    tiny: TinyWorld, data: dict[str, Path], tmp_path: Path, more: tuple[str, ...], named: str
) -> None:
    out = tmp_path / "out"
    run(flags(tiny, data, "squad", out))
    with pytest.raises(ForeignResults, match=named):
        run([*flags(tiny, data, "squad", out), *more])


def test_another_adapter_or_data_set_is_another_run(tiny: TinyWorld, data: dict[str, Path], tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run(flags(tiny, data, "squad", out))
    with pytest.raises(ForeignResults, match="adapter is"):
        run([*flags(tiny, data, "squad", out), f"--adapter=a16={tiny.adapters['a8']}"])
    other.write_text(data["squad"].read_text() + "\n")
    with pytest.raises(ForeignResults, match="data is"):
        run([*flags(tiny, data, "squad", out), f"--data={other}"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--limit=0",), "--limit is 0; it must be at least 1"),
        (("--skip-share=1",), "--skip-share is 1.0"),
        (("--window=8", "--stride=9"), "stride <= window"),
        (("--adapter=", "--mode=full"), "needs an adapter"),
        (("--adapter=a=x,b=y",), "names 2 adapters"),
    ],
)
def test_flags_that_contradict_are_refused(
    tiny: TinyWorld, data: dict[str, Path], tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InvalidFlags, match=message):
        run([*flags(tiny, data, "squad", tmp_path / "out"), *more])

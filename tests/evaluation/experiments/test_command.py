"""Every experiment on the tiny model, from the command line to its files; interruption, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chunkwise.cli import main
from chunkwise.config.flags import InvalidFlags
from chunkwise.evaluation.driver import Evaluator
from chunkwise.evaluation.jobs import Job, Outcome
from chunkwise.evaluation.modes import SteeringMode
from conftest import TinyWorld
from evaluation.experiments.subjects import flags, settings, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_data(tmp_path_factory.mktemp("data"))


def files(out: Path) -> dict[str, bytes]:
    """Everything but pictures, whose bytes name the time."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.suffix in (".csv", ".md")}


@pytest.mark.parametrize(("name", "task"), [("ablation", "wikitext"), ("crossfade", "squad"), ("kv", "translation")])
def test_an_experiment_writes_its_tables_and_its_plot(
    tiny: TinyWorld, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, task: str
) -> None:
    pytest.importorskip("matplotlib")
    main(flags(name, tiny, data, tmp_path, task))
    output = capsys.readouterr()
    summary = json.loads(output.out.splitlines()[-1])
    assert summary["files"] == [str(tmp_path / f"{name}{suffix}") for suffix in (".csv", ".md", ".png")]
    assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = (tmp_path / f"{name}.md").read_text()
    assert shown in output.out and shown.startswith(f"# {name}\n") and "3 windows of" in shown
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
    assert {row["adapter"] for row in rows} == {"mine"}


def test_an_interrupted_experiment_goes_on_where_it_stopped(
    tiny: TinyWorld,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = 0
    real = Evaluator.run_group

    def counted(self: Evaluator, jobs: Sequence[Job], mode: SteeringMode) -> list[Outcome]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(self, jobs, mode)

    arguments = flags("crossfade", tiny, data, tmp_path / "parts", "wikitext")
    monkeypatch.setattr(Evaluator, "run_group", counted)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "crossfade.md").exists()
    main(arguments)
    # Five windows, the third of which was tried twice; and nothing is left to do.
    assert calls == 6
    main(arguments)
    assert calls == 6
    main(flags("crossfade", tiny, data, tmp_path / "whole", "wikitext"))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_without_matplotlib_the_tables_are_written_and_the_plot_is_asked_for(
    tiny: TinyWorld,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delitem(sys.modules, "chunkwise.evaluation.experiments.plots", raising=False)
    for module in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    main(flags("crossfade", tiny, data, tmp_path, "wikitext"))
    assert "pip install 'chunkwise[plot]'" in capsys.readouterr().err
    assert set(files(tmp_path)) == {"crossfade.csv", "crossfade.md"} and not (tmp_path / "crossfade.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--items=0"], "--items is 0; it must be at least 1"),
        (["--subject", "chess", "a", "b"], "the task 'chess'; use one of wikitext, squad, translation"),
        (["--subject", "squad", "a=x,b=y", "b"], "names 2 adapters"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(
    tiny: TinyWorld, data: dict[str, Path], tmp_path: Path, change: list[str], message: str
) -> None:
    with pytest.raises(InvalidFlags, match=message):
        settings(flags("ablation", tiny, data, tmp_path, "squad", *change))


def test_an_adapter_is_named_after_its_directory_unless_it_is_named(
    tiny: TinyWorld, data: dict[str, Path], tmp_path: Path
) -> None:
    more = ["--subject", "squad", str(tiny.adapters["a8"]), str(data["squad"])]
    subjects: Any = settings(flags("kv", tiny, data, tmp_path, "squad", *more)).subjects
    assert [subject.adapter.name for subject in subjects] == ["mine", "a8"]

"""Quality against rank on the tiny model: the tables against `chunkwise eval` and against each other."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from chunkwise.cli import main
from chunkwise.evaluation.experiments.figures import aurac
from conftest import TinyWorld
from evaluation.experiments.subjects import flags, write_data

ROLES = "[rank]\nprompt_rung = 1\nanswer_rung = 8\n"


@pytest.fixture(scope="module")
def out(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run over questions and translations."""
    folder = tmp_path_factory.mktemp("ranks")
    data = write_data(folder)
    (folder / "roles.toml").write_text(ROLES)
    more = ["--subject", "translation", f"other={tiny.adapters['a8']}", str(data["translation"])]
    arguments = flags("ranks", tiny, data, folder, "squad", *more, f"--policy={folder / 'roles.toml'}")
    main([*arguments, "--calibration-tokens=200"])
    return folder


def rows(path: Path, **where: str) -> list[dict[str, str]]:
    """The rows of a CSV file that have these cells."""
    lines = csv.DictReader(path.read_text().splitlines())
    return [row for row in lines if all(row[column] == cell for column, cell in where.items())]


def test_every_subject_measure_and_ladder_has_its_rungs(out: Path) -> None:
    for adapter, metrics in (("mine", ("exact_match", "f1")), ("other", ("bleu",))):
        for ladder in ("plain", "plain+global", "whitened", "whitened+global"):
            found = rows(out / "ranks.csv", adapter=adapter, task="answers", ladder=ladder)
            rungs = [float(row["rung"]) for row in found]
            full = 16 if adapter == "mine" else 8
            assert rungs == ([0, 0.25, 1, 4, full] if "global" in ladder else [0, 1, 4, full])
            assert float(found[0]["mean rank"]) == 0 and float(found[-1]["mean rank"]) == full
        for metric in metrics:
            generated = rows(out / "ranks.csv", adapter=adapter, task="generated", metric=metric)
            assert {row["ladder"] for row in generated} == {"plain+global"}


def test_uniform_rungs_execute_themselves_and_all_ladders_share_their_ends(out: Path) -> None:
    for ladder in ("plain", "whitened"):
        for row in rows(out / "ranks.csv", task="answers", ladder=ladder):
            assert float(row["mean rank"]) == float(row["rung"])
    for rung in ("0", "16"):
        ends = rows(out / "ranks.csv", adapter="mine", task="answers", rung=rung)
        assert len(ends) == 5 and len({row["value"] for row in ends}) == 1


def test_a_rung_has_the_value_that_eval_gives_it(
    tiny: TinyWorld, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plain ladder with global ranks is what `eval` loads from a directory without a ladder file."""
    (row,) = rows(out / "ranks.csv", adapter="mine", task="answers", ladder="plain+global", rung="0.25")
    where = [f"--model-id={tiny.model}", f"--adapter=mine={tiny.adapters['a16']}", f"--data={out / 'squad'}"]
    sizes = ["--limit=3", "--skip-share=0.5", "--threads=1"]
    main(["eval", *where, *sizes, "--task=nll", "--mode=rung=0.25", f"--out={tmp_path / 'out'}"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert float(row["value"]) == pytest.approx(summary["metrics"]["nll_per_token"]["value"], abs=1e-3)
    assert float(row["mean rank"]) == pytest.approx(summary["mean_active_rank"]["all"], abs=1e-4)


def test_areas_are_those_of_the_rows(out: Path) -> None:
    for row in rows(out / "ranks-areas.csv", adapter="mine", task="answers"):
        curve = rows(out / "ranks.csv", adapter="mine", task="answers", ladder=row["curve"])
        if not curve:
            assert row["curve"] in ("policies", "fixed at policies' ranks")
            continue
        area = aurac([float(one["mean rank"]) for one in curve], [float(one["value"]) for one in curve])
        assert float(row["AURAC"]) == pytest.approx(area, rel=1e-3)
        enough = [one for one in curve if float(one["rung"]) >= float(row["enough"])]
        assert all(float(one["loss against full"]) <= 0.01 for one in enough)
        assert float(row["surely"]) >= float(row["enough"])


def test_a_policy_is_compared_with_the_fixed_rung_of_its_cost(out: Path) -> None:
    (row,) = rows(out / "ranks-policies.csv", adapter="mine", task="answers")
    assert (row["policy"], float(row["prompt"]) < 1.5, float(row["answer"]) > 5) == ("roles", True, True)
    assert float(row["fixed rank"]) == pytest.approx(float(row["mean rank"]), abs=0.05)
    difference = float(row["value"]) - float(row["fixed value"])
    assert float(row["difference"]) == pytest.approx(difference, abs=2e-3 * abs(difference) + 1e-4)
    assert float(row["difference low"]) <= float(row["difference"]) <= float(row["difference high"])
    two = rows(out / "ranks-areas.csv", adapter="mine", task="answers", curve="policies")
    assert len(two) == 1 and two[0]["more"]


def test_people_see_one_table_of_rungs_per_number(out: Path) -> None:
    shown = (out / "ranks.md").read_text()
    assert shown.count("| rung | plain | plain+global | whitened | whitened+global |") == 2
    assert shown.count("| rung | plain+global |") == 3
    assert "mine, generated: exact_match" in shown and "other, generated: bleu" in shown


def test_the_fitted_ladder_is_kept(out: Path) -> None:
    names = sorted(path.name.split("-")[:2] for path in (out / "ladders").iterdir())
    assert names == [[name, kind] for name in ("mine", "other") for kind in ("sensitive", "whitened")]


def test_policies_alone_are_those_of_the_whole_experiment(tiny: TinyWorld, out: Path) -> None:
    """In the same folder, so nothing is run again; the rows are the same."""
    data = {name: out / name for name in ("wikitext", "squad", "translation")}
    runs = set((out / "runs").iterdir())
    main(flags("policies", tiny, data, out, "squad", f"--policy={out / 'roles.toml'}"))
    assert set((out / "runs").iterdir()) == runs
    assert rows(out / "policies.csv") == rows(out / "ranks-policies.csv", adapter="mine")
    assert {row["metric"] for row in rows(out / "policies.csv")} == {"nll_per_token", "exact_match", "f1"}


def test_ladders_are_compared_from_the_first_rung_that_both_have(out: Path) -> None:
    (row,) = rows(out / "ranks-areas.csv", adapter="mine", task="answers", curve="plain+global")
    curves = {}
    for ladder in ("plain", "plain+global"):
        found = rows(out / "ranks.csv", adapter="mine", task="answers", ladder=ladder)
        curves[ladder] = [float(one["mean rank"]) for one in found], [float(one["value"]) for one in found]
    start = max(1.0, *(rank for rank in curves["plain+global"][0] if rank < 1.5))
    plain, spread = (aurac(*curve, start) for curve in curves.values())
    assert float(row["more"]) == pytest.approx(spread - plain, abs=1e-3)


def test_text_may_be_scored_as_if_it_were_generated(tiny: TinyWorld, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    (tmp_path / "roles.toml").write_text(ROLES)
    main(flags("policies", tiny, data, tmp_path, "wikitext", f"--policy={tmp_path / 'roles.toml'}", "--decode-text"))
    (row,) = rows(tmp_path / "policies.csv")
    # 31 tokens at the prompt's rung, what follows at the answer's.
    assert float(row["prompt"]) < 2.0 and float(row["answer"]) > 7.5

"""The ablation's table against the records of its runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from chunkwise.cli import main
from conftest import TinyWorld
from evaluation.experiments.subjects import flags, write_data


def test_differences_are_those_between_the_arm_and_the_fixed_rung_of_its_cost(tiny: TinyWorld, tmp_path: Path) -> None:
    data, out = write_data(tmp_path), tmp_path / "out"
    main(flags("ablation", tiny, data, out, "squad"))
    rows = list(csv.DictReader((out / "ablation.csv").read_text().splitlines()))
    assert [row["signals"] for row in rows][:3] == ["all", "entropy alone", "novelty alone"]
    assert len(rows) == 9

    def nll(arm: str) -> list[float]:
        (file,) = (out / "runs").glob(f"answers-mine-{arm}-*.jsonl")
        return [value for line in file.read_text().splitlines()[1:] for value in json.loads(line)["nll"]]

    adaptive = nll("position-alone")
    (row,) = [row for row in rows if row["signals"] == "position alone"]
    assert float(row["NLL"]) == pytest.approx(sum(adaptive) / len(adaptive), rel=1e-5)
    assert float(row["mean rank"]) == pytest.approx(float(row["fixed rank"]), abs=0.05)
    assert float(row["difference"]) == pytest.approx(float(row["NLL"]) - float(row["fixed NLL"]), abs=1e-4)
    for row in rows:
        assert 1 <= float(row["mean rank"]) <= 4
        assert float(row["difference low"]) <= float(row["difference"]) <= float(row["difference high"])

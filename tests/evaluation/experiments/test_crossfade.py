"""Which tokens are at a boundary, and that the table says of them what the records do."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from chunkwise.cli import main
from chunkwise.evaluation.experiments.crossfade import WINDOWS, boundary_tokens
from conftest import TinyWorld
from evaluation.experiments.subjects import flags, write_data


def record(runs: list[tuple[int, float]], first: int, scored: int) -> dict[str, Any]:
    return {"rank_runs": runs, "first": first, "nll": [0.0] * scored}


def test_tokens_predicted_up_to_16_positions_behind_a_change_are_at_a_boundary() -> None:
    # The change is at position 20, whose output predicts the token at 21, which is number 20 of those from 1 on.
    assert boundary_tokens(record([(20, 1.0), (40, 4.0)], 1, 59)) == list(range(20, 36))
    # Scored from 30 on: the first scored token is predicted at 29, the last of the boundary at 35.
    assert boundary_tokens(record([(20, 1.0), (40, 4.0)], 30, 30)) == list(range(7))
    # Changes close to each other share tokens, and the sequence may end first.
    assert boundary_tokens(record([(50, 1.0), (4, 2.0), (6, 1.0)], 1, 59)) == list(range(50, 59))
    assert boundary_tokens(record([(60, 1.0)], 1, 59)) == []


def test_the_table_is_what_the_records_say(tiny: TinyWorld, tmp_path: Path) -> None:
    data, out = write_data(tmp_path), tmp_path / "out"
    policy = tmp_path / "hard.toml"
    policy.write_text(
        '[estimator]\ngain = 6.0\n[chunker]\nthreshold = 0.02\n[rank]\nsource = "complexity"\nmin_rank = 1\n', "utf-8"
    )
    main(flags("crossfade", tiny, data, out, "wikitext", f"--policy={policy}"))
    rows = list(csv.DictReader((out / "crossfade.csv").read_text().splitlines()))
    assert [int(row["window"]) for row in rows] == list(WINDOWS)
    runs = {}
    for window in WINDOWS:
        (file,) = (out / "runs").glob(f"text-mine-window-{window}-*.jsonl")
        runs[window] = [json.loads(line) for line in file.read_text().splitlines()][1:]
    reference = [boundary_tokens(one) for one in runs[0]]
    assert sum(map(len, reference)) > 0
    for row in rows:
        records = runs[int(row["window"])]
        near = [nll for one, chosen in zip(records, reference, strict=True) for nll in (one["nll"][i] for i in chosen)]
        every = [nll for one in records for nll in one["nll"]]
        first = [nll for one in runs[0] for nll in one["nll"]]
        assert int(row["boundary tokens"]) == len(near)
        assert float(row["perplexity"]) == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-4)
        assert float(row["boundary perplexity"]) == pytest.approx(math.exp(sum(near) / len(near)), rel=1e-4)
        difference = (sum(every) - sum(first)) / len(every)
        assert float(row["NLL less window 0"]) == pytest.approx(difference, abs=1e-5)
    # The wider of two rungs is paid for as long as they are mixed.
    ranks = [float(row["mean rank"]) for row in rows]
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]

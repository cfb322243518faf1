"""KV policies on the tiny model: bytes against the cache's own arithmetic, and ranks that policies do not touch."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from chunkwise.cli import main
from chunkwise.config.policy import InvalidPolicy
from chunkwise.evaluation.experiments.kv import kv_policies
from conftest import TinyWorld
from evaluation.experiments.subjects import flags, write_data

POSITION_BYTES = 2 * 4 * 3 * 8 * 4  # keys and values, layers, heads, head_dim, fp32


def test_bytes_are_those_that_the_cache_held(tiny: TinyWorld, tmp_path: Path) -> None:
    data, out = write_data(tmp_path), tmp_path / "out"
    policy = tmp_path / "early.toml"
    policy.write_text('[kv]\nkind = "int8"\nwhen = "always"\nsink_tokens = 16\nrecent_tokens = 16\n')
    # Two windows of 1,024 do not fit the tiny model; one question and answer does.
    main(flags("kv", tiny, data, out, "squad", f"--policy={policy}", "--policy=int8", "--batch-tokens=512"))
    rows = {row["policy"]: row for row in csv.DictReader((out / "kv.csv").read_text().splitlines())}
    assert list(rows) == ["full", "early", "int8"]
    (file,) = (out / "runs").glob("generated-mine-kv-full-*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()][1:]
    pages = [-(-sum(record["tokens"]) // 16) for record in records]
    full = rows["full"]
    assert float(full["end MB an item"]) == pytest.approx(16 * POSITION_BYTES * sum(pages) / len(pages) / 1e6, rel=1e-4)
    assert (full["of full"], full["end of full"], full["less full"]) == ("100.0%", "100.0%", "")
    assert float(rows["early"]["end MB an item"]) < float(full["end MB an item"])
    assert all(record["rank_runs"] == [[sum(record["tokens"]), 16.0]] for record in records)


def test_a_policy_is_a_kind_or_a_file_and_full_comes_first(tmp_path: Path) -> None:
    assert list(kv_policies([])) == ["full", "int8", "int4", "keep", "window", "complexity"]
    assert list(kv_policies(["int8"])) == ["full", "int8"]
    with pytest.raises(InvalidPolicy, match="int9"):
        kv_policies(["int9"])

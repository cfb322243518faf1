"""Zipf draws, the replayed trace, and that every scenario asks for what its name says."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from chunkwise.bench.scenarios import OURS, SCENARIO_OF, STEERED, replay, zipf_adapters
from chunkwise.config.bench_flags import (
    SCENARIOS,
    BenchSettings,
    InvalidBenchFlags,
    TraceSettings,
    add_bench,
    bench_settings,
)

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47.6805900,5000,900
2023-11-16 18:15:50.6805900,91,16
2023-11-16 18:16:50.6805900,7,1
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def settings(tmp_path: Path, *flags: str) -> BenchSettings:
    parser = argparse.ArgumentParser()
    add_bench(parser.add_subparsers())
    args = parser.parse_args(["bench", f"--model-id={tmp_path}", f"--adapters={tmp_path}", *flags])
    return bench_settings(args)


def test_zipf_falls_off_as_one_over_rank() -> None:
    counts = Counter(zipf_adapters(30000, 8))
    for k in range(8):
        assert counts[k] / counts[0] == pytest.approx(1 / (k + 1), rel=0.1)
    assert zipf_adapters(32, 16) == zipf_adapters(32, 16)
    assert len(Counter(zipf_adapters(1000, 8, exponent=0.0)).values()) == 8


def test_a_trace_is_stretched_and_cut(trace: Path) -> None:
    """At half its pace for ten seconds, the trace's first five seconds are played, over ten."""
    streams = replay(trace, TraceSettings(trace, speed=0.5, seconds=10, max_prompt=1000, max_new=100), 4)
    assert [(s.prompt_tokens, s.new_tokens) for s in streams] == [(374, 44), (1000, 100), (91, 16)]
    assert [s.start_ms for s in streams] == pytest.approx([0, 2000, 8000])
    assert all(s.adapter is not None and 0 <= s.adapter < 4 for s in streams)


@pytest.mark.parametrize("text", ["", "TIMESTAMP,ContextTokens\n", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2\n"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InvalidBenchFlags, match=r"--trace .*bad\.csv"):
        replay(path, TraceSettings(path, 1.0, 10, 100, 100), 4)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidBenchFlags, match="cannot be used"):
        replay(tmp_path / "none", TraceSettings(tmp_path / "none", 1.0, 10, 100, 100), 4)


def test_scenarios_are_what_they_are_called(tmp_path: Path, trace: Path) -> None:
    made = {name: SCENARIO_OF[name](settings(tmp_path, f"--trace={trace}")) for name in SCENARIOS}
    assert all(scenario.name == name for name, scenario in made.items())
    (mixed,) = made["mixed8"].cases
    assert sorted(s.adapter for s in mixed.streams if s.adapter is not None) == list(range(8))
    (zipf,) = made["zipf32"].cases
    assert len(zipf.streams) == 32
    assert made["prefill1k"].tokens > 1024
    base, one = made["tax8"].cases
    assert {s.adapter for s in base.streams} == {None}
    assert {s.adapter for s in one.streams} == {0}
    assert made["rank8"].engines == (OURS, STEERED)
    assert made["cold"].streams == 1
    for scenario in made.values():
        adapters = {s.adapter for case in scenario.cases for s in case.streams} - {None}
        assert not adapters or max(a for a in adapters if a is not None) < scenario.adapters


def test_the_first_use_of_a_cold_adapter_always_finds_it_evicted_and_the_second_never(tmp_path: Path) -> None:
    scenario = SCENARIO_OF["cold"](settings(tmp_path))
    (flag,) = scenario.flags
    slots = int(flag.removeprefix("--max-active-adapters="))
    _, *uses = scenario.cases
    resident = list(range(slots))
    for case in uses:
        (stream,) = case.streams
        assert (stream.adapter in resident) == (case.setting == "again")
        resident = [*(each for each in resident if each != stream.adapter), stream.adapter][-slots:]
    assert [case.setting for case in uses] == ["first use", "again"] * scenario.adapters


def test_all_scenarios_are_the_default_less_the_trace_without_a_file(tmp_path: Path) -> None:
    assert settings(tmp_path).scenarios == tuple(name for name in SCENARIOS if name != "trace")
    with pytest.raises(InvalidBenchFlags, match="needs --trace"):
        settings(tmp_path, "--scenarios=trace")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--scenarios=single,double", "names double; use single"),
        ("--engines=tgi", "names tgi; use chunkwise"),
        ("--rounds=0", "--rounds is 0"),
        ("--new-tokens=1", "--new-tokens is 1"),
        ("--trace-speed=0", "--trace-speed is 0"),
        ("--adapters=/nowhere", "is '/nowhere', which is not a directory"),
    ],
)
def test_wrong_flags_are_refused(tmp_path: Path, flag: str, message: str) -> None:
    with pytest.raises(InvalidBenchFlags, match=message):
        settings(tmp_path, flag)


def test_new_tokens_reach_the_streams(tmp_path: Path) -> None:
    given = replace(settings(tmp_path), new_tokens=7)
    assert {s.new_tokens for s in SCENARIO_OF["mixed8"](given).cases[0].streams} == {7}

"""What the README says exists: its scripts, flags, files, and the policy it calls the default."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from chunkwise.config.flags import build_parser
from chunkwise.config.policy import SteeringPolicy, parse_policy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCH_ROUTER = {"--step-ms", "--steps", "--streams"}
BENCH_KV = {"--batch", "--context", "--depths", "--hay", "--policies", "--rivals"}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"scripts/(\w+)", README))))
def test_scripts_are_there_and_executable(name: str) -> None:
    assert os.access(ROOT / "scripts" / name, os.X_OK)


def test_the_policy_shown_is_the_default() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert parse_policy(block) == SteeringPolicy()


def test_flags_are_known() -> None:
    known = set()
    parser = build_parser({})
    for action in parser._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr, attr-defined]
        known |= set(action._option_string_actions)
    elsewhere = {
        "--uds-path",
        "--plain-shards",
        "--socket",
        "--adapter",
        "--prompts",
        "--strict",
        *BENCH_KV,
        *BENCH_ROUTER,
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known | elsewhere


def test_folders_of_the_table_are_there() -> None:
    for cell in re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE):
        for path in re.findall(r"`([\w./-]+)`", cell):
            assert any((root / path).exists() for root in (ROOT, ROOT / "backend" / "chunkwise")), path

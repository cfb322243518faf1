"""What the launcher is told reaches the processes it starts."""

from __future__ import annotations

import argparse

import pytest

from chunkwise.config.flags import build_parser
from chunkwise.launcher.serve import _ROUTER_FLAGS, _SHARD_FLAGS

# Given to each child in a form of its own.
OWN = {"help", "model_id", "revision", "lora_adapters", "threads", "port", "api_key"}


def names(command: str) -> set[str]:
    (commands,) = (a for a in build_parser({})._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest for action in commands.choices[command]._actions}


@pytest.mark.parametrize(("command", "passed_on"), [("shard", _SHARD_FLAGS), ("router", _ROUTER_FLAGS)])
def test_every_flag_a_child_shares_with_the_launcher_is_passed_on(command: str, passed_on: tuple[str, ...]) -> None:
    shared = names("serve") & names(command)
    assert shared - OWN - set(passed_on) == set()
    assert set(passed_on) <= shared

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from chunkwise import cli


@pytest.mark.parametrize(
    ("chosen", "seen"), [({}, "-event_engine_client,-event_engine_listener"), ({"GRPC_EXPERIMENTS": "x"}, "x")]
)
def test_a_command_starts_without_grpcs_event_engine_unless_the_user_has_chosen(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], seen: str
) -> None:
    found: list[str | None] = []
    command = SimpleNamespace(run=lambda args: found.append(os.environ.get("GRPC_EXPERIMENTS")))
    monkeypatch.setitem(sys.modules, "the_command", command)  # type: ignore[arg-type]
    monkeypatch.setitem(cli._COMMANDS, "router", "the_command")
    monkeypatch.setattr(os, "environ", chosen)
    cli.main(["router"])
    assert found == [seen]

"""Recorded traffic of one, two, four and sixty-four clients, replayed call by call; see recordings/record.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chunkwise.pb import generate_pb2 as pb
from conformance.conftest import Door
from conformance.player import Player, Step
from conformance.recordings.record import recordings

RECORDINGS = sorted((Path(__file__).parent / "recordings").glob("*.json"))
REASONS = {
    "length": pb.FINISH_REASON_LENGTH,
    "eos": pb.FINISH_REASON_EOS_TOKEN,
    "stop": pb.FINISH_REASON_STOP_SEQUENCE,
}


class Replay:
    """One recording on its way through a server. ``running`` are the cached batches by their recorded name."""

    def __init__(self, player: Player) -> None:
        self._player = player
        self._ids: dict[int, int] = {}
        self.running: dict[int, pb.CachedBatch] = {}

    def perform(self, call: dict[str, Any]) -> None:
        """Sends one call and holds the answer against the recorded one."""
        match call["call"]:
            case "prefill":
                requests = [self._request(**asked) for asked in call["requests"]]
                cached = self.running.pop(call["cached"]) if call["cached"] is not None else None
                self._check(call, self._player.prefill(*requests, cached=cached, id=call["batch"]))
            case "decode":
                self._check(call, self._player.decode(*[self.running.pop(name) for name in call["batches"]]))
            case "filter":
                rest = self._player.filter(self.running[call["batch"]].id, self._named(call["live"]))
                assert (rest.size, sorted(rest.request_ids)) == (len(call["live"]), sorted(self._named(call["live"])))
                self.running[call["batch"]] = rest
            case "clear":
                self._player.router.clear(self.running.pop(call["batch"]).id)

    def _check(self, call: dict[str, Any], step: Step) -> None:
        player = self._player
        assert sorted(step.generations) == sorted(self._named(call["tokens"]))
        ended = {id: player.answer(id).end for id in step.generations if player.answer(id).ended}
        assert {id: (end.generated_tokens, end.finish_reason) for id, end in ended.items()} == {
            self._ids[int(id)]: (count, REASONS[kind]) for id, (count, kind) in call.get("ended", {}).items()
        }
        rest = player.follow(step)
        live = self._named(call["live"])
        assert (rest.size if rest else 0) == len(live)
        if rest is not None:
            assert sorted(rest.request_ids) == sorted(live)
            self.running[call["name"]] = rest
        for id in self._named(call["gone"]):
            player.leave(id)

    def _named(self, ids: list[int]) -> list[int]:
        return [self._ids[id] for id in ids]

    def _request(self, id: int, tokens: int, new: int, adapter: int, kind: str, chunk: int | None = None) -> pb.Request:
        names: list[str | None] = [None, *self._player.adapters]
        shape = {} if kind == "length" else {"grammar": "a", "grammar_type": pb.GRAMMAR_TYPE_REGEX}
        request = self._player.request(
            tokens,
            new,
            seed=1000 + id,
            adapter_id=names[adapter % len(names)],
            parameters=shape,
            stopping={"ignore_eos_token": kind != "eos", "stop_sequences": ["a"] if kind == "stop" else []},
            chunk_len=chunk,
        )
        self._ids[id] = request.id
        return request


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_recorded_sequence_of_calls_is_answered_as_recorded(door: Door, path: Path) -> None:
    recording = json.loads(path.read_text())
    with door.warmed(recording["max_prefill_tokens"]) as player:
        if recording["chunking"] and not player.info.support_chunking:
            pytest.skip("Info says that the server does not support chunking, so no router sends these calls")
        replay = Replay(player)
        for call in recording["calls"]:
            replay.perform(call)
        assert not replay.running
        assert player.held() == 0


def test_the_recordings_are_what_their_script_writes() -> None:
    assert recordings() == {path.name: path.read_text() for path in RECORDINGS}

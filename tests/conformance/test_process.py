"""Checklist items 1 to 9: processes of their own, as TGI's launcher starts and ends them."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from chunkwise.config.adapters import InvalidAdapters, parse_lora_adapters
from chunkwise.config.settings import AdapterSource
from chunkwise.pb import generate_pb2 as pb
from conformance.conftest import Door
from conformance.player import Player
from conformance.ranks import LEVELS, PROGRAM, START_SECONDS, Rank, alive, await_sockets, ended, environment, start
from conftest import TinyWorld
from tgi_router import TgiRouter

pytestmark = pytest.mark.usefixtures("own_process")

# All of section 1.3 but --sharded, which is item 8's, and --quantize, which the tiny model has no weights for.
FLAGS = (
    *("--trust-remote-code", "--speculate", "2", "--dtype", "bfloat16", "--kv-cache-dtype", "fp8_e5m2"),
    *("--revision", "main", "--otlp-endpoint", "http://127.0.0.1:4317", "--otlp-service-name", "router"),
    *("--max-input-tokens", "200"),
)


@pytest.fixture(scope="module")
def warning(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rank, Path]]:
    """A rank with every flag and ``--logger-level WARN``; nobody has waited for its socket."""
    place = tmp_path_factory.mktemp("warning")
    rank = start(place, tiny.model, environment(tiny.adapters), *FLAGS, level="WARN")
    with ended([rank]):
        yield rank, place


@pytest.fixture(scope="module")
def silent(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rank, Path]]:
    """A rank with ``--logger-level OFF`` that found the socket of one that died."""
    place = tmp_path_factory.mktemp("silent")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{place}/s-0")
    rank = start(place, tiny.model, environment(tiny.adapters), "--otlp-service-name", "router", level="OFF")
    with ended([rank]):
        yield rank, place


def answering(place: Path, rank: Rank) -> TgiRouter:
    """A router, as soon as one gets through."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert rank.process.poll() is None, rank.err.read_text()
        assert time.monotonic() < deadline
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(f"{place}/s-0")
            return TgiRouter(f"{place}/s")
        except OSError:
            time.sleep(0.05)


def refused(place: Path, *arguments: str, **env: str) -> str:
    """Standard error of a start that must fail at once and leave no socket."""
    done = subprocess.run([*PROGRAM, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert not list(place.glob("s-*"))
    return done.stderr


def records(text: str) -> list[dict[str, dict[str, dict[str, str]]]]:
    """Log lines, each checked for what TGI's launcher reads of it."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(record["text"], str) for record in found)
    assert {record["record"]["level"]["name"] for record in found} <= LEVELS
    return found


def test_item_01_download_weights_of_a_directory_needs_no_network(tiny: TinyWorld) -> None:
    arguments = f"{tiny.model} --extension .safetensors --logger-level INFO --json-output --merge-lora"
    command = [*PROGRAM, "download-weights", *arguments.split()]
    done = subprocess.run(command, env=environment({}), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert records(done.stdout)


def test_item_03_the_socket_appears_when_the_server_accepts(warning: tuple[Rank, Path]) -> None:
    rank, place = warning
    assert not (place / "s-0").exists()
    await_sockets(place, [rank])
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(f"{place}/s-0")


def test_item_02_serve_accepts_every_flag_and_the_levels_warn_and_off(
    warning: tuple[Rank, Path], silent: tuple[Rank, Path]
) -> None:
    for (rank, place), dtype in ((warning, "bfloat16"), (silent, "float32")):
        with answering(place, rank) as router:
            assert router.info.dtype == dtype
    assert {record["record"]["level"]["name"] for record in records(warning[0].out.read_text())} == {"WARNING"}
    assert not silent[0].out.read_text()


def test_item_04_a_stale_socket_does_not_prevent_the_start(silent: tuple[Rank, Path]) -> None:
    with answering(silent[1], silent[0]) as router:
        player = Player(router, [], [], [])
        assert player.run(player.request(new=2))[0].ended


def test_item_05_every_line_of_stdout_is_a_json_record(door: Door) -> None:
    player = door.player()
    player.run(player.request(new=2))
    assert all(records(rank.out.read_text()) for rank in door.ranks), "each rank logs something"
    assert not any(rank.err.read_text() for rank in door.ranks)


def test_item_06_sigterm_ends_a_server_in_mid_forward(silent: tuple[Rank, Path]) -> None:
    rank, place = silent
    with answering(place, rank) as router:
        player = Player(router, [], [], [])
        batch = player.batch([player.request(400, 90, seed=i) for i in range(16)])
        step = router.shards[0].Prefill.future(pb.PrefillRequest(batch=batch))
        time.sleep(0.05)
        family, began = rank.family(), time.monotonic()
        assert rank.end() == 0
        assert time.monotonic() - began < 30
        assert not any(alive(pid) for pid in family)
        assert not list(place.glob("s-*"))
        step.cancel()


def test_item_07_a_model_that_cannot_be_loaded_ends_the_process(tiny: TinyWorld, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for file in tiny.model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:1000])
    refused(tmp_path, "serve", str(broken), "--uds-path", f"{tmp_path}/s", "--json-output", **environment({}))


def test_item_08_sharded_needs_its_rank(tiny: TinyWorld, tmp_path: Path, silent: tuple[Rank, Path]) -> None:
    env = environment({})
    del env["RANK"]
    error = refused(tmp_path, "serve", str(tiny.model), "--uds-path", f"{tmp_path}/s", "--sharded", **env)
    assert "RANK" in error
    assert not error.count("Traceback")
    assert silent[1].name.startswith("silent"), "and RANK=0 with WORLD_SIZE=1 is how that one was started"


def test_item_09_the_grammar_of_lora_adapters(tiny: TinyWorld, tmp_path: Path) -> None:
    assert parse_lora_adapters("a, b@r,c=/p ,  d=/p@r") == (
        AdapterSource("a", "a", None),
        AdapterSource("b", "b", "r"),
        AdapterSource("c", "/p", None),
        AdapterSource("d", "/p", "r"),
    )
    for wrong in ("a=b=c", "a@b@c"):
        with pytest.raises(InvalidAdapters):
            parse_lora_adapters(wrong)
    env = environment({}, LORA_ADAPTERS="a=b=c")
    assert "a=b=c" in refused(tmp_path, "serve", str(tiny.model), "--uds-path", f"{tmp_path}/s", **env)


def test_item_44_prefill_tokens_are_absent_unless_enabled(warning: tuple[Rank, Path]) -> None:
    with answering(warning[1], warning[0]) as router:
        player = Player(router, [], [], [])
        request = player.request(new=1, prefill_logprobs=True)
        try:
            generations = player.prefill(request).generations
        except grpc.RpcError as error:
            raise AssertionError("what is not enabled is ignored") from error
        assert not generations[request.id].HasField("prefill_tokens")

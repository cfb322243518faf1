"""`text-generation-server` as TGI's launcher starts it, on live processes, driven as TGI's router would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from chunkwise.config.settings import AdapterSource, LogSettings, ParallelSettings
from chunkwise.config.tgi_flags import TgiDownloadSettings, TgiServeSettings
from chunkwise.core import ChunkDecision, SteeringUpdate, UnsupportedModel
from chunkwise.launcher.tgi import download_weights, front_command, shard_command, shard_sockets
from chunkwise.pb import generate_pb2 as pb
from conftest import TinyWorld
from serving import Driver, request
from tgi_router import TgiRouter, liveness_request, text_request

PROGRAM = [sys.executable, "-c", "from chunkwise.launcher.tgi_cli import main; main()"]
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."
LEVELS = {"TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"}


@dataclass(frozen=True)
class Rank:
    """One running `text-generation-server serve`."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def family(self) -> list[int]:
        """Its process id and those of its children."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def end(self, seconds: float = 30) -> int:
        """Its exit status after SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def environment(tiny: TinyWorld, **changes: str) -> dict[str, str]:
    """What TGI's launcher gives a shard, over an environment without its variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CHUNKWISE_", "MAX_", "PORT", "HOSTNAME"))}
    return {
        **clean,
        "LORA_ADAPTERS": ", ".join(f"{name}={path}" for name, path in tiny.adapters.items()),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "CUDA_MEMORY_FRACTION": "1",
        "HF_HUB_ENABLE_HF_TRANSFER": "1",
        "HF_HUB_OFFLINE": "1",
        "ATTENTION": "paged",
        "PREFIX_CACHING": "0",
        "OMP_NUM_THREADS": "1",
        "MAX_BATCH_TOTAL_TOKENS": "8192",
    } | changes


@contextmanager
def started(tiny: TinyWorld, path: Path, *flags: str, world_size: int = 1, **env: str) -> Iterator[list[Rank]]:
    """All ranks, once their sockets are there. At the end nothing may be left of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [*PROGRAM, "serve", str(tiny.model), f"--uds-path={path}/s", "--logger-level", "INFO", "--json-output"]
    command += [*(["--sharded"] if world_size > 1 else []), "--otlp-service-name", "x", *flags]
    ranks: list[Rank] = []
    for rank in range(world_size):
        place = environment(tiny, RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_PORT=port, **env)
        out, err = path / f"out-{rank}", path / f"err-{rank}"
        with out.open("w") as stdout, err.open("w") as stderr:
            ranks.append(Rank(subprocess.Popen(command, stdout=stdout, stderr=stderr, env=place), out, err))
    try:
        deadline = time.monotonic() + 90
        while not all((path / f"s-{rank}").exists() for rank in range(world_size)):
            assert time.monotonic() < deadline
            assert all(r.process.poll() is None for r in ranks), [r.err.read_text() for r in ranks]
            time.sleep(0.05)
        yield ranks
    finally:
        families = [pid for r in ranks if r.process.poll() is None for pid in r.family()]
        for r in ranks:
            r.end()
        assert not any(alive(pid) for pid in families)
        assert not list(path.glob("s-*"))


def policy_file(path: Path, text: str) -> str:
    (path / "policy.toml").write_text(text)
    return str(path / "policy.toml")


def refused(tiny: TinyWorld, *arguments: str, **env: str) -> str:
    """Standard error of a start that must fail with status 1."""
    done = subprocess.run(
        [*PROGRAM, *arguments], env=environment(tiny, **env), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_two_ranks_behind_the_steering_router_answer_as_the_engine(tiny: TinyWorld, tmp_path: Path) -> None:
    """At full rank and with a full KV cache steering changes no token, however requests join, merge and leave."""
    adapters = [None, "a4", "a8", "a16"]
    wanted = [request(i, TEXT[: 9 + 3 * i], new=6 + i, adapter_id=adapters[i % 4]) for i in range(6)]
    driver = Driver(tiny.model, tiny.adapters)
    alone = {r.id: driver.run(r)[r.id] for r in wanted}
    asked = [text_request(r.id, r.inputs, r.stopping.max_new_tokens, adapter_id=r.adapter_id) for r in wanted]
    policy = policy_file(tmp_path, '[rank]\nsource = "complexity"\nmin_rank = 16\n[kv]\nkind = "full"\n')
    (tmp_path / "s-0").write_text("stale")
    with (
        started(tiny, tmp_path, "--speculate", "2", world_size=2, CHUNKWISE_POLICY=policy) as ranks,
        TgiRouter(f"{tmp_path}/s", max_prefill_tokens=128) as router,
    ):
        assert router.urls == [f"unix://{tmp_path}/s-0"], "a router must not reach past the front"
        assert router.limits.max_input_tokens < router.limits.max_total_tokens <= 512
        assert router.states()[0].sequences == 0
        cached = router.prefill(0, asked[:3])
        other = router.prefill(1, asked[3:4])
        assert cached is not None
        assert other is not None
        assert router.states()[0].steered_requests == 3
        merged = router.decode(cached, other)
        assert merged is not None
        merged = router.filter(merged, [0, 2, 3])
        going_on = router.prefill(2, asked[4:], merged)
        while going_on is not None:
            going_on = router.decode(going_on)
        state = router.states()[0]
        assert (state.sequences, state.steered_requests) == (0, 0)
        assert all(pages.used == 0 for pages in state.kv_pages)
        assert router.tokens.pop(1) == alone.pop(1)[:2]
        assert router.tokens == alone
        output = "".join(r.out.read_text() for r in ranks)
        records = [json.loads(line) for line in output.splitlines()]
        assert all(isinstance(record["text"], str) for record in records)
        assert {record["record"]["level"]["name"] for record in records} <= LEVELS
        assert any("--speculate 2 is ignored" in record["text"] for record in records)
        assert not any(r.err.read_text() for r in ranks)
        assert [r.end() for r in ranks] == [0, 0]


def test_a_policy_of_rank_1_answers_as_rank_1(tiny: TinyWorld, tmp_path: Path) -> None:
    r = request(0, TEXT, new=30, adapter_id="a16")
    driver = Driver(tiny.model, tiny.adapters)
    full = driver.run(r)[0]
    driver = Driver(tiny.model, tiny.adapters)
    driver.steer(SteeringUpdate(1, (ChunkDecision(0, 0, 1),)))
    low = driver.run(r, seq=1)[0]
    assert low != full
    policy = policy_file(tmp_path, '[rank]\nprompt_rung = 1\nanswer_rung = 1\n[kv]\nkind = "full"\n')
    with started(tiny, tmp_path, CHUNKWISE_POLICY=policy), TgiRouter(f"{tmp_path}/s") as router:
        assert router.run(text_request(0, TEXT, 30, adapter_id="a16"))[0] == low
        # The base model's name, as OpenAI clients send it, is no adapter.
        named, bare = text_request(1, TEXT, 9, adapter_id=str(tiny.model)), text_request(2, TEXT, 9)
        tokens = router.run(named, bare)
        assert tokens[1] == tokens[2] == driver.run(request(3, TEXT, new=9))[3]
        (unknown,) = router.shards[0].Prefill(_prefill(text_request(4, TEXT, adapter_id="nobody"))).generations
        assert unknown.generated_text.generated_tokens == 1
        assert "nobody" in unknown.error.message


def _prefill(*requests: pb.Request) -> pb.PrefillRequest:
    return pb.PrefillRequest(batch=pb.Batch(id=0, requests=requests, size=len(requests)))


def test_plain_shards_serve_the_launchers_sockets_themselves(tiny: TinyWorld, tmp_path: Path) -> None:
    r = request(0, TEXT, new=12, adapter_id="a16")
    with (
        started(tiny, tmp_path, "--plain-shards", world_size=2) as ranks,
        TgiRouter(f"{tmp_path}/s", max_prefill_tokens=128) as router,
    ):
        assert router.urls == [f"unix://{tmp_path}/s-0", f"unix://{tmp_path}/s-1"]
        assert [len(rank.family()) for rank in ranks] == [2, 2]
        assert router.run(text_request(0, TEXT, 12, adapter_id="a16")) == Driver(tiny.model, tiny.adapters).run(r)


def test_health_and_sigterm_in_the_middle_of_a_step(tiny: TinyWorld, tmp_path: Path) -> None:
    """Steps of many long prompts; the probe waits its turn, Health does not, and SIGTERM waits for neither."""
    prompts = [text_request(i, TEXT * 6, new=40, adapter_id="a16") for i in range(16)]
    with started(tiny, tmp_path) as (rank,), TgiRouter(f"{tmp_path}/s", max_prefill_tokens=8000) as router:
        family = rank.family()
        assert len(family) == 3
        shard = router.shards[0]
        step = shard.Prefill.future(_prefill(*prompts))
        began = time.monotonic()
        shard.Health(pb.HealthRequest(), timeout=1.0)
        probe = shard.Prefill(liveness_request())
        assert step.done()
        assert not probe.HasField("batch")
        assert step.result().batch.size == 16
        decode = shard.Decode.future(pb.DecodeRequest(batches=[step.result().batch]))
        assert rank.end() == 0
        assert time.monotonic() - began < 30
        assert not any(alive(pid) for pid in family)
        decode.cancel()


def test_a_shard_that_dies_ends_the_rank_with_an_error(tiny: TinyWorld, tmp_path: Path) -> None:
    with started(tiny, tmp_path) as (rank,):
        os.kill(rank.family()[1], signal.SIGKILL)
        assert rank.process.wait(30) == 1
        assert "shard 0 ended with status -9" in rank.err.read_text()


def test_a_killed_server_takes_its_children_along(tiny: TinyWorld, tmp_path: Path) -> None:
    with started(tiny, tmp_path) as (rank,):
        _, *children = rank.family()
        rank.process.kill()
        rank.process.wait()
        deadline = time.monotonic() + 30
        while any(alive(pid) for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_router_that_restarts_starts_over(tiny: TinyWorld, tmp_path: Path) -> None:
    with started(tiny, tmp_path):
        with TgiRouter(f"{tmp_path}/s") as router:
            router.prefill(0, [text_request(0, TEXT, 50, adapter_id="a16")])
            lost = router.shards[0].Decode.future(pb.DecodeRequest(batches=[pb.CachedBatch(id=0)]))
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            lost.result()
        with TgiRouter(f"{tmp_path}/s") as router:
            assert router.states()[0].sequences == 0
            assert len(router.run(text_request(0, TEXT, 5, adapter_id="a16"))[0]) == 5


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        (["--quantize", "gptq"], {}, "--quantize is 'gptq'"),
        (["--sharded"], {"RANK": ""}, "--sharded needs RANK, MASTER_PORT"),
        ([], {"LORA_ADAPTERS": "a=b=c"}, "more than one '='"),
        ([], {"LORA_ADAPTERS": "x=/nowhere/at/all"}, "neither a directory"),
        ([], {"ROPE_FACTOR": "4"}, "is not implemented"),
        ([], {"CHUNKWISE_POLICY": "/nowhere.toml"}, "policy file"),
        ([], {"MAX_BATCH_TOTAL_TOKENS": "none"}, "shard 0 ended with status 1"),
    ],
)
def test_what_cannot_work_is_refused_at_start(
    tiny: TinyWorld, tmp_path: Path, flags: list[str], env: dict[str, str], words: str
) -> None:
    error = refused(tiny, "serve", str(tiny.model), f"--uds-path={tmp_path}/s", *flags, **env)
    assert words in error
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_loaded(tiny: TinyWorld, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    (model / "tokenizer.json").write_bytes((tiny.model / "tokenizer.json").read_bytes())
    assert "gpt2" in refused(tiny, "serve", str(model), f"--uds-path={tmp_path}/s", LORA_ADAPTERS="")
    assert not list(tmp_path.glob("s-*"))


def test_download_weights_of_a_directory_needs_no_network(tiny: TinyWorld) -> None:
    arguments = f"download-weights {tiny.model} --extension .safetensors --logger-level INFO --json-output --merge-lora"
    done = subprocess.run(
        [*PROGRAM, *arguments.split()], env=environment(tiny), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert str(tiny.model) in json.loads(done.stdout)["text"]


def test_download_weights_that_are_not_there(tiny: TinyWorld) -> None:
    """Offline, with the downloader switched on that TGI's launcher asks for and that is not installed."""
    error = refused(tiny, "download-weights", "nobody/nothing", "--extension", ".safetensors")
    assert error.count("\n") == 1
    assert "'nobody/nothing' is neither a directory nor available from the Hub" in error


def test_what_is_no_weights_and_what_is_no_base_model(tiny: TinyWorld, tmp_path: Path) -> None:
    adapter = str(tiny.adapters["a16"])
    download_weights(TgiDownloadSettings(adapter, None))
    with pytest.raises(UnsupportedModel, match=r"has no config\.json, so it is no base model"):
        download_weights(TgiDownloadSettings(adapter, None, base_model=True))
    with pytest.raises(UnsupportedModel, match=r"extension '\.bin'; only \.safetensors"):
        download_weights(TgiDownloadSettings(str(tiny.model), None, extension=".bin"))
    with pytest.raises(UnsupportedModel, match="has no weights"):
        download_weights(TgiDownloadSettings(str(tmp_path), None))


def test_every_rank_knows_every_shard_and_the_front_keeps_the_launchers_name(tiny: TinyWorld) -> None:
    settings = TgiServeSettings(
        "org/model",
        None,
        "/tmp/u",
        ParallelSettings(1, 2, "host", 29500),
        dtype="bfloat16",
        adapters=(AdapterSource("a", str(tiny.adapters["a4"])),),
        prefill_logprobs=True,
        threads=3,
        policy=Path("p.toml"),
        log=LogSettings("OFF", True),
    )
    assert shard_sockets(settings) == [Path("/tmp/u-0.shard"), Path("/tmp/u-1")]
    urls = "--shard-urls=unix:///tmp/u-0.shard,unix:///tmp/u-1"
    shared = [urls, "--log-level=OFF", "--json-output"]
    assert shard_command(settings, tiny.model)[3:] == [
        "shard",
        f"--model-id={tiny.model}",
        f'--lora-adapters={{"a": "{tiny.adapters["a4"]}"}}',
        *["--rank=1", "--world-size=2", "--master-addr=host", "--master-port=29500"],
        *shared,
        *["--dtype=bfloat16", "--threads=3", "--enable-prefill-logprobs"],
    ]
    assert front_command(settings, tiny.model)[3:] == [
        "front",
        f"--model-id={tiny.model}",
        "--model-name=org/model",
        "--listen=unix:///tmp/u-0",
        "--policy=p.toml",
        *shared,
    ]


def test_the_program_is_installed_under_tgis_name() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["text-generation-server"] == "chunkwise.launcher.tgi_cli:main"

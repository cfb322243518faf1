"""The whole path on live processes: HTTP, router, steering stream, two tensor-parallel shards, tokens back."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from chunkwise import wire
from chunkwise.core import Grammar, SamplingParams, StoppingParams
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import generate_pb2_grpc as pb_grpc
from chunkwise.shard.watermark import Watermark
from conftest import TinyWorld
from e2e.conftest import Server, alive, running, wait_for
from serving import Driver, request

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


def _ids(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


def _events(server: Server, body: dict[str, Any], path: str = "/generate_stream") -> list[dict[str, Any]]:
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return [json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:")]


def test_answers_with_and_without_adapter_differ_and_stream_as_they_are(two_shards: Server) -> None:
    texts = {}
    for adapter in (None, "a4", "a16"):
        parameters = {"max_new_tokens": 12, "adapter_id": adapter, "details": True}
        whole = two_shards.generate(TEXT, **parameters)
        events = _events(two_shards, {"inputs": TEXT, "parameters": parameters})
        assert [event["token"]["id"] for event in events] == _ids(whole)
        assert events[-1]["generated_text"] == whole["generated_text"]
        texts[adapter] = whole["generated_text"]
    assert len(set(texts.values())) == 3


def test_unsteered_service_equals_the_engine(plain: Server, tiny: TinyWorld) -> None:
    driver = Driver(tiny.model, tiny.adapters)
    for id, adapter in enumerate([None, "a4", "a8", "a16"]):
        expected = driver.run(request(id, TEXT, new=16, adapter_id=adapter))[id]
        got = _ids(plain.generate(TEXT, max_new_tokens=16, adapter_id=adapter, details=True))
        assert got == expected[: len(got)]
        assert len(got) == 16 or got[-1] == 257, "an answer ends early only by end of sequence"


def test_two_shards_equal_one_with_steering_on(
    two_shards: Server, tiny: TinyWorld, policy: Path, tmp_path: Path
) -> None:
    with running(tiny, tmp_path / "log", f"--policy={policy}") as one:
        for adapter in ("a8", "a16"):
            wanted = {"max_new_tokens": 60, "adapter_id": adapter, "chunk_details": True}
            first, second = (server.generate(TEXT, **wanted) for server in (one, two_shards))
            assert _ids(first) == _ids(second)
            ranks = [[(c["start"], c["end"], c["rung"]) for c in a["details"]["chunks"]] for a in (first, second)]
            assert ranks[0] == ranks[1]


def test_chunks_tile_the_sequence_and_ranks_move(two_shards: Server) -> None:
    answer = two_shards.generate(TEXT * 3, max_new_tokens=80, adapter_id="a16", chunk_details=True)
    chunks = answer["details"]["chunks"]
    assert chunks[0]["start"] == 0
    assert [c["end"] for c in chunks[:-1]] == [c["start"] for c in chunks[1:]]
    assert chunks[-1]["end"] == len(TEXT) * 3 + answer["details"]["generated_tokens"] - 1
    assert {0, 2, 16} <= {c["rung"] for c in chunks}, "by price in the prompt, then the answer's"
    assert 0 < answer["details"]["mean_rank"] < 16
    by_complexity = two_shards.generate(TEXT * 3, max_new_tokens=80, adapter_id="a8", chunk_details=True)
    assert len({c["rung"] for c in by_complexity["details"]["chunks"]}) > 1


def test_many_at_once_equal_alone(plain: Server) -> None:
    wanted = [
        {"max_new_tokens": 5 + 3 * i, "adapter_id": [None, "a4", "a8", "a16"][i % 4], "details": True}
        for i in range(12)
    ]
    alone = [_ids(plain.generate(TEXT[: 10 + i], **parameters)) for i, parameters in enumerate(wanted)]
    got: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        got[i] = _ids(plain.generate(TEXT[: 10 + i], **wanted[i]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(12)] == alone


def test_a_client_that_goes_away_frees_pages_and_steering_state_on_every_shard(two_shards: Server) -> None:
    parts = urlsplit(two_shards.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    body = {"inputs": TEXT, "parameters": {"max_new_tokens": 400, "adapter_id": "a16"}}
    connection.request("POST", "/generate_stream", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    for _ in range(10):
        response.readline()

    def held() -> list[float]:
        names = ("chunkwise_shard_sequences", "chunkwise_shard_steered_requests", "chunkwise_kv_pages")
        return [value for name in names for value in two_shards.metric(name).values()]

    assert len(two_shards.metric("chunkwise_shard_sequences")) == 2
    assert all(value == 1 for value in two_shards.metric("chunkwise_shard_sequences").values())
    assert all(value == 1 for value in two_shards.metric("chunkwise_shard_steered_requests").values())
    assert sum(two_shards.metric("chunkwise_kv_pages").values()) > 0
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_for("release of everything", lambda: not any(held()))


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{not json", 400, "JSON"),
        ({"inputs": ""}, 422, "inputs"),
        ({"inputs": "x", "parameters": {"temperature": -1}}, 422, "temperature"),
        ({"inputs": "x" * 600}, 422, "600"),
        ({"inputs": "x", "parameters": {"adapter_id": "../../etc"}}, 404, "a16"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 100000}}, 422, "max_new_tokens"),
        ({"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "("}}}, 422, "grammar"),
    ],
)
def test_bad_input_is_refused_with_a_reason(two_shards: Server, body: Any, status: int, words: str) -> None:
    got, answer = two_shards.post("/generate", body)
    assert got == status, answer
    assert words in answer["error"]
    assert isinstance(answer["error_type"], str)


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_text_generation_client(two_shards: Server) -> None:
    from text_generation import AsyncClient, Client
    from text_generation.errors import ValidationError

    client = Client(two_shards.url, timeout=60)
    answer = client.generate(TEXT, max_new_tokens=6)
    assert answer.details.generated_tokens == len(answer.details.tokens) == 6
    streamed = list(client.generate_stream(TEXT, max_new_tokens=6))
    assert [event.token.id for event in streamed] == [token.id for token in answer.details.tokens]
    assert streamed[-1].generated_text == answer.generated_text
    with pytest.raises(ValidationError):
        client.generate("x" * 600, max_new_tokens=6)

    async def ask() -> str:
        return (await AsyncClient(two_shards.url, timeout=60).generate(TEXT, max_new_tokens=6)).generated_text

    assert asyncio.run(ask()) == answer.generated_text


PATTERN = "(yes|no|漢), [0-9]{3}"


def test_answers_under_grammars_and_bad_grammars_beside_them(two_shards: Server, tiny: TinyWorld) -> None:
    """On two ranks, all at once: the shards agree on every token and on every refusal."""
    schema = {"properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}}}
    schema["required"] = ["ok", "n"]
    grammars = {
        "regex": {"type": "regex", "value": PATTERN},
        "json": {"type": "json", "value": schema | {"additionalProperties": False}},
        "none": None,
        "malformed": {"type": "regex", "value": "("},
        "growing": {"type": "regex", "value": r"([a-z]{1,1000}){1,1000}"},
    }
    answers: dict[str, Any] = {}

    def ask(name: str) -> None:
        parameters = {"max_new_tokens": 200, "grammar": grammars[name], "watermark": name == "regex"}
        answers[name] = two_shards.post("/generate", {"inputs": TEXT, "parameters": parameters})

    threads = [threading.Thread(target=ask, args=(name,)) for name in grammars]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: status for name, (status, _) in answers.items()} == {
        "regex": 200,
        "json": 200,
        "none": 200,
        "malformed": 422,
        "growing": 422,
    }
    assert re.fullmatch(PATTERN, answers["regex"][1]["generated_text"])
    value = json.loads(answers["json"][1]["generated_text"])
    assert value["ok"] in (True, False)
    assert value["n"] in range(10)
    assert "unclosed group" in answers["malformed"][1]["error"]
    assert "too many" in answers["growing"][1]["error"]
    driver = Driver(tiny.model)
    sampling = SamplingParams(grammar=Grammar("regex", PATTERN), watermark=True)
    driver.run(request(0, TEXT, sampling=sampling, stopping=StoppingParams(200)))
    assert driver.texts[0] == answers["regex"][1]["generated_text"]


def test_a_grammar_that_fails_in_a_stream_ends_it_with_an_event(two_shards: Server) -> None:
    grammar = {"type": "regex", "value": r"([a-z]{1,1000}){1,1000}"}
    events = _events(two_shards, {"inputs": TEXT, "parameters": {"max_new_tokens": 200, "grammar": grammar}})
    assert len(events) > 10
    assert events[-1]["error_type"] == "validation"


def test_flags_of_watermark_and_grammars(tiny: TinyWorld, tmp_path: Path) -> None:
    flags = ("--watermark-gamma=0.2", "--watermark-delta=1000", "--disable-grammar-support", "--no-steering")
    with running(tiny, tmp_path / "log", *flags) as server:
        ids = _ids(server.generate(TEXT, max_new_tokens=20, watermark=True, details=True))
        refused = {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "a"}}}
        status, answer = server.post("/generate", refused)
    green = Watermark(0.2, 1000.0)
    assert all(id in green.greenlist(previous, 259) for previous, id in pairwise(ids))
    assert status == 422
    assert "`grammar` is not supported by this server" in answer["error"]


def test_a_repeated_prompt_is_reused_on_every_shard(two_shards: Server) -> None:
    text = "a prompt that nobody else in these tests sends, longer than a page"
    answers, reused = [], []
    for _ in range(2):
        answers.append(two_shards.generate(text, max_new_tokens=4, adapter_id="a8", details=True))
        reused.append(two_shards.metric("chunkwise_prefix_reused_tokens"))
    assert _ids(answers[0]) == _ids(answers[1])
    assert [reused[1][shard] - reused[0][shard] for shard in reused[0]] == [64, 64]


def test_prompt_logprobs_reach_the_client(tiny: TinyWorld, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "log", "--enable-prefill-logprobs") as server:
        prefill = server.generate(TEXT, max_new_tokens=2, decoder_input_details=True)["details"]["prefill"]
        assert [token["text"] for token in prefill] == list(TEXT)
        assert prefill[0]["logprob"] is None
        assert all(token["logprob"] < 0 for token in prefill[1:])


def test_info_health_and_metrics(two_shards: Server) -> None:
    info = json.loads(two_shards.get("/info"))
    assert (info["max_total_tokens"], info["max_input_tokens"]) == (512, 511)
    assert two_shards.get("/health") == ""
    assert "tgi_request_count " in two_shards.get("/metrics")


def test_a_shard_alone_serves_a_raw_grpc_client_over_tcp(tiny: TinyWorld) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "chunkwise", "shard", f"--model-id={tiny.model}", f"--shard-urls={url}"]
    command += [f"--lora-adapters=a8={tiny.adapters['a8']}", "--max-batch-total-tokens=2048", "--json-output"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        with grpc.insecure_channel(url) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
            stub = pb_grpc.TextGenerationServiceStub(channel)
            warmup = pb.WarmupRequest(batch=wire.batch_to_pb(0, [request(0, "_test " * 9)]), max_prefill_tokens=128)
            assert stub.Warmup(warmup).max_total_tokens == 512
            response = stub.Prefill(
                pb.PrefillRequest(batch=wire.batch_to_pb(0, [request(0, TEXT, new=5, adapter_id="a8")]))
            )
            got = list(response.generations[0].tokens.ids)
            while response.HasField("batch"):
                response = stub.Decode(pb.DecodeRequest(batches=[response.batch]))
                got.extend(response.generations[0].tokens.ids)
        assert got == Driver(tiny.model, tiny.adapters).run(request(0, TEXT, new=5, adapter_id="a8"))[0]
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = [json.loads(line) for line in output.splitlines()]
    assert all(line["record"]["level"]["name"] == "INFO" for line in lines)
    assert any("listens on" in line["text"] for line in lines)


def test_a_lost_shard_ends_the_service_and_leaves_no_process(tiny: TinyWorld, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "log", "--num-shard=2") as server:
        family = server.descendants()
        assert len(family) == 3
        os.kill(family[0], signal.SIGKILL)
        assert server.process.wait(40) != 0
        wait_for("the end of all processes", lambda: not any(alive(pid) for pid in family))
        assert "ended with status" in server.log.read_text()


def test_sigterm_ends_everything_cleanly(tiny: TinyWorld, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "log") as server:
        family = server.descendants()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert not any(alive(pid) for pid in family)


def test_killing_the_launcher_takes_its_children_along(tiny: TinyWorld, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "log") as server:
        family = server.descendants()
        server.process.kill()
        server.process.wait()
        wait_for("the end of all children", lambda: not any(alive(pid) for pid in family), seconds=30)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model-id=/nowhere/at/all"], "neither a directory"),
        (["--lora-adapters=x=/nowhere/at/all"], "neither a directory"),
        (["--num-shard=10"], "at most 9 shards"),
        (["--quantize=gptq"], "--quantize"),
        (["--policy=/nowhere.toml"], "policy file"),
    ],
)
def test_what_cannot_work_is_refused_at_start(tiny: TinyWorld, flags: list[str], words: str) -> None:
    command = [sys.executable, "-m", "chunkwise", "serve", "--port=0", f"--model-id={tiny.model}", *flags]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 1
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_for_other_weights_are_refused_at_start(tiny: TinyWorld, policy: Path) -> None:
    adapter = f"--lora-adapters=a16={tiny.adapters['a8']}"
    command = [sys.executable, "-m", "chunkwise", "serve", "--port=0", f"--model-id={tiny.model}", adapter]
    done = subprocess.run(
        [*command, f"--policy={policy}"], capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False
    )
    assert done.returncode == 1
    assert 'policy section adapters."a16" was made for weights' in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_api_key(tiny: TinyWorld, tmp_path: Path) -> None:
    with running(tiny, tmp_path / "log", "--api-key=secret") as server:
        body = {"inputs": TEXT, "parameters": {"max_new_tokens": 2}}
        assert server.post("/generate", body)[0] == 401
        assert server.post("/generate", body, authorization="Bearer wrong")[0] == 401
        assert server.post("/generate", body, authorization="Bearer secret")[0] == 200
        for pid in server.descendants():
            assert "secret" not in Path(f"/proc/{pid}/cmdline").read_text()

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient

from chunkwise.config.settings import Limits
from chunkwise.core import GenerationFailed, GenerationRequest, RequestError, SamplingParams, StoppingParams
from chunkwise.router.api.serving import SERVING
from fakes import FakeShards, letter
from routing import http

Client = TestClient[Any, Any]


def expected(prompt: str, length: int, *, adapter: str | None = None, seed: int | None = None) -> str:
    """What the toy model answers to a prompt that came over HTTP (a seed means that the request samples)."""
    ids = (0, *(ord(character) for character in prompt))
    offset = _byte_offsets()
    prompt_ids = (0, *(offset[id] for id in ids[1:]))
    sampling = SamplingParams(do_sample=seed is not None, seed=seed or 0)
    request = GenerationRequest(0, prompt, sampling, StoppingParams(length), prompt_ids=prompt_ids, adapter_id=adapter)
    return "".join(letter(request, i) for i in range(length))


def _byte_offsets() -> dict[int, int]:
    """Ids of ASCII characters under the test tokenizer: printable ones sort before all others."""
    return {code: code - ord("!") + 2 for code in range(ord("!"), ord("~") + 1)}


async def json_of(response: ClientResponse, status: int = 200) -> Any:
    assert response.status == status, await response.text()
    assert response.content_type == "application/json"
    return await response.json()


async def sse_of(response: ClientResponse) -> list[dict[str, Any]]:
    """The events of a stream, with its framing checked."""
    assert response.status == 200
    assert response.content_type == "text/event-stream"
    assert response.headers["x-accel-buffering"] == "no"
    body = (await response.read()).decode()
    assert body.endswith("\n\n")
    frames = body[:-2].split("\n\n")
    assert all(frame.startswith("data:{") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data:")) for frame in frames]


def generate(client: Client, parameters: dict[str, Any] | None = None, *, path: str = "/generate", **body: Any) -> Any:
    """Starts a request for "hi" unless told otherwise."""
    return client.post(path, json={"inputs": "hi", "parameters": parameters, **body})


async def test_generate_answers_with_the_text_alone(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        body = await json_of(await generate(client, {"max_new_tokens": 4}))
        assert body == {"generated_text": expected("hi", 4)}


async def test_details_describe_every_token(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        body = await json_of(await generate(client, {"max_new_tokens": 3, "details": True, "top_n_tokens": 2}))
        details = body["details"]
        assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens"]
        assert (details["finish_reason"], details["generated_tokens"]) == ("length", 3)
        assert (details["seed"], details["prefill"]) == (None, [])
        assert "".join(token["text"] for token in details["tokens"]) == body["generated_text"]
        assert details["tokens"][0] == {
            "id": ord(body["generated_text"][0]),
            "text": body["generated_text"][0],
            "logprob": -0.5,
            "special": False,
        }
        # The toy's second choice is impossible: JSON has no minus infinity.
        assert [top["logprob"] for top in details["top_tokens"][0]] == [-0.5, None]


@pytest.mark.parametrize("switch", ["details", "decoder_input_details", "chunk_details"])
async def test_three_parameters_switch_details_on(model_dir: Path, switch: str) -> None:
    async with http(FakeShards(), model_dir) as client:
        body = await json_of(await generate(client, {"max_new_tokens": 3, switch: True}))
        assert ("chunks" in body["details"]) == (switch == "chunk_details")


async def test_chunk_details_tile_prompt_and_answer(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        wanted = {"max_new_tokens": 20, "chunk_details": True, "adapter_id": "law"}
        details = (await json_of(await generate(client, wanted)))["details"]
        chunks = details["chunks"]
        assert len(chunks) > 2
        assert [chunk["start"] for chunk in chunks] == [0, *(chunk["end"] for chunk in chunks[:-1])]
        assert chunks[-1]["end"] == 3 + 20 - 1, "the last token is never computed"
        assert {chunk["kv"] for chunk in chunks} <= {"full", "int8", "int4"}
        mean = sum((c["end"] - c["start"]) * c["rank"] for c in chunks) / 22
        assert details["mean_rank"] == pytest.approx(mean)
        assert (details["kv_bytes"], details["kv_bytes_saved"]) == (2200, 6600)
        assert set(chunks[0]) == {
            "start",
            "end",
            "rung",
            "rank",
            "scale",
            "crossfade",
            "complexity",
            "kv",
            "kv_dropped",
        }
        stream = await sse_of(await generate(client, wanted, path="/generate_stream"))
        assert stream[-1]["details"]["chunks"] == chunks


async def test_chunk_details_without_steering(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir, policy=None) as client:
        wanted = {"max_new_tokens": 5, "chunk_details": True, "adapter_id": "law"}
        details = (await json_of(await generate(client, wanted)))["details"]
        (chunk,) = details["chunks"]
        assert (chunk["start"], chunk["end"], chunk["rank"], chunk["kv"]) == (0, 7, 8.0, "full")
        assert details["mean_rank"] == 8.0


@pytest.mark.parametrize(
    ("shards", "parameters", "reason", "length"),
    [
        (FakeShards, {"max_new_tokens": 2}, "length", 2),
        (lambda: FakeShards(eos_at={"hi": 3}), {"max_new_tokens": 9}, "eos_token", 4),
        (FakeShards, {"max_new_tokens": 9, "stop": [expected("hi", 3)[1:]]}, "stop_sequence", 3),
    ],
)
async def test_finish_reasons(model_dir: Path, shards: Any, parameters: Any, reason: str, length: int) -> None:
    async with http(shards(), model_dir) as client:
        details = (await json_of(await generate(client, {**parameters, "details": True})))["details"]
        assert (details["finish_reason"], details["generated_tokens"]) == (reason, length)


async def test_the_prompt_is_repeated_on_demand(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        wanted = {"max_new_tokens": 2, "return_full_text": True}
        assert (await json_of(await generate(client, wanted)))["generated_text"] == "hi" + expected("hi", 2)
        stream = await sse_of(await generate(client, wanted, path="/generate_stream"))
        assert stream[-1]["generated_text"] == "hi" + expected("hi", 2)


async def test_the_root_answers_with_a_list_and_the_full_text_unless_refused(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        (body,) = await json_of(await generate(client, {"max_new_tokens": 2}, path="/"))
        assert body == {"generated_text": "hi" + expected("hi", 2)}
        refused = {"max_new_tokens": 2, "return_full_text": False}
        (body,) = await json_of(await generate(client, refused, path="/", stream=False))
        assert body == {"generated_text": expected("hi", 2)}
        stream = await sse_of(await generate(client, refused, path="/", stream=True))
        assert stream[-1]["generated_text"] == expected("hi", 2)


async def test_a_stream_has_one_event_per_token_and_ends_with_the_text(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        wanted = {"max_new_tokens": 3, "details": True}
        stream = await sse_of(await generate(client, wanted, path="/generate_stream"))
        text = expected("hi", 3)
        assert [event["index"] for event in stream] == [1, 2, 3]
        assert [event["token"]["text"] for event in stream] == list(text)
        assert all(event["generated_text"] is None and event["details"] is None for event in stream[:-1])
        assert stream[-1]["generated_text"] == text
        assert stream[-1]["details"] == {
            "finish_reason": "length",
            "generated_tokens": 3,
            "seed": None,
            "input_length": 3,
        }
        assert "top_tokens" not in stream[0]


async def test_a_stream_has_details_and_top_tokens_only_when_asked(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        wanted = {"max_new_tokens": 2, "top_n_tokens": 1}
        stream = await sse_of(await generate(client, wanted, path="/generate_stream"))
        assert stream[-1]["details"] is None
        assert [event["top_tokens"] for event in stream] == [[event["token"]] for event in stream]


async def test_sampling_is_on_without_parameters_and_off_with_them(model_dir: Path) -> None:
    shards = FakeShards(eos_at={"hi": 2})
    async with http(shards, model_dir) as client:
        bodies = ({"inputs": "hi"}, {"inputs": "hi", "parameters": None}, {"inputs": "hi", "parameters": {}})
        texts = [(await json_of(await client.post("/generate", json=body)))["generated_text"] for body in bodies]
        assert texts[2] == expected("hi", 2)
        # Random 64-bit seeds: one chance in 26 each that the sampled text is the greedy one, so ask for the seed too.
        sampled = {"do_sample": True, "details": True}
        seeds = [(await json_of(await generate(client, sampled)))["details"]["seed"] for _ in range(2)]
        assert seeds[0] != seeds[1]
        assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
async def test_a_seed_is_used_and_told(model_dir: Path, seed: int) -> None:
    async with http(FakeShards(), model_dir) as client:
        wanted = {"max_new_tokens": 4, "seed": seed, "do_sample": True, "details": True}
        body = await json_of(await generate(client, wanted))
        assert body["generated_text"] == expected("hi", 4, seed=seed)
        assert body["details"]["seed"] == seed


async def test_a_seed_without_sampling_is_not_told(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        body = await json_of(await generate(client, {"max_new_tokens": 4, "seed": 3, "details": True}))
        assert (body["generated_text"], body["details"]["seed"]) == (expected("hi", 4), None)


async def test_best_of_gives_the_best_and_the_others(model_dir: Path) -> None:
    shards = FakeShards()
    async with http(shards, model_dir) as client:
        wanted = {"max_new_tokens": 8, "best_of": 2, "do_sample": True, "details": True}
        bodies = [await json_of(await generate(client, wanted)) for _ in range(4)]
        for body in bodies:
            (other,) = body["details"]["best_of_sequences"]
            assert body["details"]["seed"] != other["seed"]
            assert {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"} <= set(other)
            means = [sum(t["logprob"] for t in s["tokens"]) / len(s["tokens"]) for s in (body["details"], other)]
            assert means[0] >= means[1]
        admitted = [id for call in shards.named("prefill") for id in call.ids]
        assert len(admitted) == 2 * len(bodies)


async def test_max_new_tokens_defaults_to_what_is_left(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        for parameters in ({"details": True}, {"details": True, "max_new_tokens": None}):
            body = await json_of(await generate(client, parameters))
            assert body["details"]["generated_tokens"] == 128 - 3


async def test_a_long_wish_is_checked_as_1024_and_cut_as_in_tgi(model_dir: Path) -> None:
    limits = Limits(max_total_tokens=1500, max_input_tokens=100)
    shards = FakeShards()
    shards.limits = type(shards.limits)(100, 1500, 4096)
    async with http(shards, model_dir, limits=limits, policy=None) as client:
        body = await json_of(await generate(client, {"max_new_tokens": 4000, "details": True}))
        assert body["details"]["generated_tokens"] == 1500 - 3


async def test_truncate_keeps_the_end_of_the_prompt(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        body = await json_of(
            await client.post(
                "/generate", json={"inputs": "x" * 500 + "hi", "parameters": {"truncate": 3, "max_new_tokens": 4}}
            )
        )
        assert body["generated_text"] == expected("hi", 4)


async def test_an_adapter_is_used_and_named_in_a_header(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        response = await generate(client, {"max_new_tokens": 4, "adapter_id": "law"})
        assert response.headers["x-adapter-id"] == "law"
        assert (await json_of(response))["generated_text"] == expected("hi", 4, adapter="law")
        for base in ("", None):
            response = await generate(client, {"max_new_tokens": 4, "adapter_id": base})
            assert "x-adapter-id" not in response.headers
            assert (await json_of(response))["generated_text"] == expected("hi", 4)


async def test_headers_tell_times_and_tokens(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        response = await generate(client, {"max_new_tokens": 4})
        headers = response.headers
        assert headers["x-compute-type"] == "cpu+optimized"
        assert headers["x-compute-characters"] == "2"
        assert (headers["x-prompt-tokens"], headers["x-generated-tokens"]) == ("3", "4")
        assert float(headers["x-compute-time"]) > 0
        for name in ("total", "validation", "queue", "inference"):
            assert int(headers[f"x-{name}-time"]) >= 0
        assert int(headers["x-time-per-token"]) <= int(headers["x-inference-time"])
        response = await generate(client, {"max_new_tokens": 4}, path="/generate_stream")
        assert (response.headers["x-compute-type"], response.headers["x-compute-characters"]) == ("cpu+optimized", "2")


async def test_tokenize_names_the_place_of_every_token(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        tokens = await json_of(await client.post("/tokenize", json={"inputs": "hé"}))
        assert [(token["text"], token["start"], token["stop"]) for token in tokens] == [
            ("", 0, 0),
            ("h", 0, 1),
            ("é", 1, 2),
            ("é", 1, 2),
        ]


async def test_a_failed_generation_is_424_and_an_event_in_a_stream(model_dir: Path) -> None:
    error = {"error": "Request failed during generation: boom", "error_type": "generation"}
    shards = FakeShards(failures={"prefill": [GenerationFailed("boom")], "decode": [GenerationFailed("boom")]})
    async with http(shards, model_dir) as client:
        assert await json_of(await generate(client, {"max_new_tokens": 4}), 424) == error
        stream = await sse_of(await generate(client, {"max_new_tokens": 4}, path="/generate_stream"))
        assert stream[0]["token"]["text"] == expected("hi", 1)
        assert stream[1:] == [error]


async def test_a_request_that_the_shard_refuses_is_422(model_dir: Path) -> None:
    shards = FakeShards(errors={"hi": RequestError("not this one", "validation")})
    async with http(shards, model_dir) as client:
        body = await json_of(await generate(client, {"max_new_tokens": 4}), 422)
        assert body == {"error": "Input validation error: not this one", "error_type": "validation"}


async def test_a_grammar_that_the_shard_refuses_is_422_and_harms_nobody(model_dir: Path) -> None:
    shards = FakeShards(errors={"bad": RequestError("grammar (regex) '(' cannot be used", "validation")})
    async with http(shards, model_dir) as client:

        async def ask(prompt: str, pattern: str, path: str = "/generate") -> ClientResponse:
            parameters = {"max_new_tokens": 9, "grammar": {"type": "regex", "value": pattern}, "watermark": True}
            response: ClientResponse = await client.post(path, json={"inputs": prompt, "parameters": parameters})
            return response

        good, bad, stream = await asyncio.gather(
            ask("hi", "[a-z]+"), ask("bad", "("), ask("bad", "(", "/generate_stream")
        )
        assert await json_of(good) == {"generated_text": expected("hi", 9)}
        error = {"error": "Input validation error: grammar (regex) '(' cannot be used", "error_type": "validation"}
        assert await json_of(bad, 422) == error
        assert await sse_of(stream) == [error]


async def test_too_many_requests_are_429(model_dir: Path) -> None:
    shards = FakeShards()
    async with http(shards, model_dir, limits=Limits(max_concurrent_requests=1)) as client:
        shards.running.clear()
        running = asyncio.create_task(generate(client, {"max_new_tokens": 4}))
        while not client.app[SERVING].loop.in_flight:
            await asyncio.sleep(0.001)
        body = await json_of(await generate(client, {"max_new_tokens": 4}), 429)
        assert body["error_type"] == "overloaded"
        (event,) = await sse_of(await generate(client, {"max_new_tokens": 4}, path="/generate_stream"))
        assert event["error_type"] == "overloaded"
        shards.running.set()
        assert await json_of(await running) == {"generated_text": expected("hi", 4)}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_a_client_that_goes_away_takes_its_request_along(model_dir: Path, path: str) -> None:
    shards = FakeShards(signal_seconds=0.002)
    async with http(shards, model_dir) as client:
        serving = client.app[SERVING]
        asking = asyncio.create_task(generate(client, {"max_new_tokens": 120}, path=path))
        while not shards.named("decode"):
            await asyncio.sleep(0.001)
        asking.cancel()
        for response in await asyncio.gather(asking, return_exceptions=True):
            if isinstance(response, ClientResponse):
                response.close()
        async with asyncio.timeout(5):
            while serving.loop.in_flight or shards.batches or shards.steered:
                await asyncio.sleep(0.001)
        assert len(shards.named("prefill", "decode")) < 100
        shards.check_empty()
        assert 'tgi_request_failure{err="dropped"} 1.0' in serving.metrics.render().decode()


async def test_many_clients_at_once_get_their_own_answers(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        prompts = [f"p{'x' * i}" for i in range(20)]

        async def ask(prompt: str, length: int) -> str:
            body = {"inputs": prompt, "parameters": {"max_new_tokens": length}}
            text: str = (await json_of(await client.post("/generate", json=body)))["generated_text"]
            return text

        answers = await asyncio.gather(*(ask(prompt, i + 1) for i, prompt in enumerate(prompts)))
        assert answers == [expected(prompt, i + 1) for i, prompt in enumerate(prompts)]

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from chunkwise import __version__
from chunkwise.config.settings import Limits
from chunkwise.core import GenerationFailed
from chunkwise.router.api.serving import SERVING
from chunkwise.router.shard_group import ShardLost
from fakes import FakeShards
from routing import http

Client = TestClient[Any, Any]


async def error_of(response: Any, status: int) -> dict[str, str]:
    """The body of an error; every one is JSON with these two strings and nothing else."""
    assert response.status == status, await response.text()
    assert response.content_type == "application/json"
    body: dict[str, str] = await response.json()
    assert set(body) == {"error", "error_type"}
    assert all(isinstance(value, str) and value for value in body.values())
    return body


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "not valid JSON"),
        ('{"inputs": "\\ud800"}', 400, "not valid JSON"),
        ("[]", 422, "`body`: Input should be an object"),
        ("{}", 422, "`inputs`: Field required"),
        ('{"inputs": 3}', 422, "`inputs`: Input should be a valid string. Given: 3"),
        ('{"inputs": "x", "parameters": []}', 422, "`parameters`: Input should be an object"),
        ('{"inputs": "x", "parameters": {"max_new_tokens": -1}}', 422, "`parameters.max_new_tokens`"),
        ('{"inputs": "x", "parameters": {"max_new_tokens": 1.5}}', 422, "`parameters.max_new_tokens`"),
        ('{"inputs": "x", "parameters": {"seed": 18446744073709551616}}', 422, "`parameters.seed`"),
        ('{"inputs": "x", "parameters": {"temperature": NaN}}', 422, "`parameters.temperature`"),
        ('{"inputs": "x", "parameters": {"temperature": "1"}}', 422, "`parameters.temperature`"),
        ('{"inputs": "x", "parameters": {"stop": "a"}}', 422, "`parameters.stop`"),
        ('{"inputs": "x", "parameters": {"adapter_id": "tax"}}', 404, "Resident adapters: law, med"),
        ('{"inputs": "x", "parameters": {"top_p": 1.0}}', 422, "Input validation error: `top_p` must be > 0"),
    ],
)
async def test_bad_bodies_are_refused_in_json(model_dir: Path, body: str, status: int, message: str) -> None:
    async with http(FakeShards(), model_dir) as client:
        response = await client.post("/generate", data=body, headers={"Content-Type": "application/json"})
        error = await error_of(response, status)
        assert message in error["error"]
        assert error["error_type"] == "validation"


async def test_validation_errors_of_a_stream_are_events(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        for path in ("/generate_stream", "/"):
            body = {"inputs": "x", "parameters": {"adapter_id": "tax"}, "stream": True}
            response = await client.post(path, json=body)
            assert response.status == 200
            text = await response.text()
            assert text.startswith('data:{"error": "Input validation error: `adapter_id` \'tax\' is not resident.')
            assert text.endswith('"error_type": "validation"}\n\n')
            assert text.count("data:") == 1


async def test_other_http_errors_are_json_too(model_dir: Path) -> None:
    limits = Limits(payload_limit=1000)
    async with http(FakeShards(), model_dir, limits=limits) as client:
        error = await error_of(await client.get("/nowhere"), 404)
        assert error == {"error": "no route /nowhere", "error_type": "not_found"}
        response = await client.get("/generate")
        assert response.headers["Allow"] == "POST"
        assert "use POST" in (await error_of(response, 405))["error"]
        error = await error_of(await client.post("/generate", json={"inputs": "x" * 2000}), 413)
        assert error["error_type"] == "payload_too_large"
        assert "1000" in error["error"]
        error = await error_of(await client.post("/generate", data="inputs=x"), 415)
        assert "send application/json" in error["error"]


async def test_an_unexpected_error_is_logged_and_not_shown(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with http(FakeShards(), model_dir) as client:
        monkeypatch.setattr(client.app[SERVING].loop, "submit", lambda request: 1 / 0)
        error = await error_of(await client.post("/generate", json={"inputs": "x"}), 500)
        assert error["error_type"] == "internal"
        assert "division" not in error["error"]
        assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
async def test_health_is_empty_when_all_is_well(model_dir: Path, path: str) -> None:
    shards = FakeShards()
    async with http(shards, model_dir) as client:
        response = await client.get(path)
        assert (response.status, await response.read()) == (200, b"")
        shards.health_error = GenerationFailed("shard 1 is silent")
        assert await error_of(await client.get(path), 503) == {
            "error": "unhealthy: shard 1 is silent",
            "error_type": "healthcheck",
        }


async def test_a_dead_loop_is_unhealthy_and_refuses_requests(model_dir: Path) -> None:
    shards = FakeShards(failures={"prefill": [ShardLost("gone")]})
    async with http(shards, model_dir) as client:
        for _ in range(2):
            error = await error_of(await client.post("/generate", json={"inputs": "x"}), 503)
            assert error["error_type"] == "generation"
        assert (await client.get("/health")).status == 503
        text = await (await client.post("/generate_stream", json={"inputs": "x"})).text()
        assert text.startswith('data:{"error": "Request failed during generation: serving has ended')


async def test_the_key_guards_generation_alone(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir, api_key="Secret") as client:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
        for path in ("/", "/generate", "/generate_stream", "/tokenize"):
            for header in (None, "Bearer wrong", "Secret", "Bearer Secret2", "Bearer \udcff"):
                headers = {"Authorization": header} if header is not None else {}
                error = await error_of(await client.post(path, json=body, headers=headers), 401)
                assert error["error_type"] == "unauthorized"
            for header in ("Bearer Secret", "bearer sEcret"):
                response = await client.post(path, json=body, headers={"Authorization": header})
                assert response.status == 200, path
        for path in ("/", "/health", "/ping", "/info", "/v1/models", "/metrics"):
            assert (await client.get(path)).status == 200, path


async def test_info_has_tgis_keys(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        info = await (await client.get("/info")).json()
        assert info == {
            "model_id": "toy/model",
            "model_sha": "abc123",
            "model_pipeline_tag": None,
            "max_concurrent_requests": 128,
            "max_best_of": 2,
            "max_stop_sequences": 4,
            "max_input_tokens": 100,
            "max_total_tokens": 128,
            "validation_workers": 1,
            "max_client_batch_size": 4,
            "router": "chunkwise",
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "adapters": ["law", "med"],
        }


async def test_models_are_the_base_and_the_adapters(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        models = await (await client.get("/v1/models")).json()
        assert models["object"] == "list"
        assert [model["id"] for model in models["data"]] == ["toy/model", "law", "med"]
        assert models["data"][1] == {"id": "law", "object": "model", "created": 0, "owned_by": "toy/model"}


async def test_pages_of_any_origin_may_call(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        preflight = await client.options(
            "/generate", headers={"Origin": "http://x", "Access-Control-Request-Method": "POST"}
        )
        assert preflight.status == 200
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert preflight.headers["Access-Control-Allow-Origin"] == "*"
        assert (await client.get("/info")).headers["Access-Control-Allow-Origin"] == "*"


async def test_a_body_that_is_not_what_its_encoding_says(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        assert (
            "Content-Encoding"
            in (await error_of(await client.post("/generate", data=b"junk", headers=headers), 400))["error"]
        )


async def test_best_of_takes_one_place_and_counts_once(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir, limits=Limits(max_concurrent_requests=1)) as client:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 2, "best_of": 2, "do_sample": True, "details": True}}
        response = await client.post("/generate", json=body)
        assert response.status == 200
        assert len((await response.json())["details"]["best_of_sequences"]) == 1
        metrics = await (await client.get("/metrics")).text()
        assert "tgi_request_duration_count 1.0" in metrics

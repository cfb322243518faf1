from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from chunkwise.core import GenerationFailed, KvFormat, KvUsage, ShardState
from chunkwise.router.metrics import Metrics
from fakes import FakeShards
from routing import http, write_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model"))


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its exact name and labels, as a scraper reads it."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_requests_are_counted_under_tgis_names(model_dir: Path) -> None:
    shards = FakeShards(failures={"decode": [GenerationFailed("boom")]})
    async with http(shards, model_dir) as client:
        for parameters in (
            {"max_new_tokens": 3},
            {"max_new_tokens": 3, "adapter_id": "law"},
            {"max_new_tokens": 4},
            {"top_p": 2.0},
            {"adapter_id": "made up"},
        ):
            await client.post("/generate", json={"inputs": "hi", "parameters": parameters})
        response = await client.get("/metrics")
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        text = await response.text()
        got = samples(text)
    assert got["tgi_request_count", ()] == 5
    assert got["tgi_request_success", ()] == 2
    assert got["tgi_request_failure", (("err", "generation"),)] == 1
    assert got["tgi_request_failure", (("err", "validation"),)] == 2
    assert got["tgi_request_generated_tokens_count", ()] == 2
    assert got["tgi_request_generated_tokens_sum", ()] == 7
    assert got["tgi_request_input_length_sum", ()] == 9
    for name in ("request", "request_validation", "request_queue", "request_inference"):
        assert got[f"tgi_{name}_duration_count", ()] >= 2
    assert got["tgi_batch_inference_count", (("method", "prefill"),)] == 3
    assert got["tgi_batch_inference_success", (("method", "prefill"),)] == 3
    assert got["tgi_batch_inference_failure", (("method", "decode"),)] == 1
    assert got["tgi_batch_forward_duration_sum", (("method", "prefill"),)] == pytest.approx(0.003)
    assert got["tgi_batch_next_size_sum", ()] == 3
    assert got["tgi_batch_max_total_tokens", ()] == 512
    assert (got["tgi_queue_size", ()], got["tgi_batch_current_size", ()]) == (0, 0)
    assert "tgi_request_count_total" not in text


async def test_steering_and_adapters_are_counted(model_dir: Path) -> None:
    async with http(FakeShards(), model_dir) as client:
        for adapter in ("law", "law", None, "made up"):
            parameters = {"max_new_tokens": 5, "adapter_id": adapter}
            await client.post("/generate", json={"inputs": "hi", "parameters": parameters})
        got = samples(await (await client.get("/metrics")).text())
    assert got["chunkwise_requests_total", (("adapter", "law"),)] == 2
    assert got["chunkwise_tokens_total", (("adapter", "law"),)] == 10
    assert got["chunkwise_requests_total", (("adapter", ""),)] == 1
    assert not any("made up" in str(key) for key in got)
    assert got["chunkwise_active_rank_count", (("adapter", "law"),)] == 2
    assert 4 <= got["chunkwise_active_rank_sum", (("adapter", "law"),)] <= 16
    assert got["chunkwise_steering_updates_total", ()] >= 3
    assert got["chunkwise_steering_decisions_total", (("kind", "release"),)] == 3
    assert got["chunkwise_steering_decisions_total", (("kind", "chunk"),)] >= 2


async def test_a_scrape_asks_the_shards(model_dir: Path) -> None:
    shards = FakeShards()
    async with http(shards, model_dir) as client:
        got = samples(await (await client.get("/metrics")).text())
        assert got["chunkwise_shard_resident_bytes", (("shard", "0"),)] == 123_456
        shards.health_error = GenerationFailed("silent")
        response = await client.get("/metrics")
        assert response.status == 200
        assert samples(await response.text())["chunkwise_shard_resident_bytes", (("shard", "0"),)] == 123_456


def test_a_format_that_is_not_in_use_any_more_falls_to_zero() -> None:
    metrics = Metrics(100)
    usage = (KvUsage(KvFormat.INT8, 7, 700),)
    counts = {"kv_rewritten_pages": 8, "kv_dropped_tokens": 48, "kv_free_pages": 5, "kv_evicted_pages": 2}
    metrics.shard_states([ShardState(), ShardState(3, 2, usage, 9, 10, kv_full_bytes=2800, **counts)])
    label = (("format", "int8"), ("shard", "1"))
    got = samples(metrics.render().decode())
    assert (got["chunkwise_kv_pages", label], got["chunkwise_kv_bytes", label]) == (7, 700)
    assert got["chunkwise_kv_pages", (("format", "full"), ("shard", "1"))] == 0
    assert got["chunkwise_shard_sequences", (("shard", "1"),)] == 3
    assert got["chunkwise_shard_steered_requests", (("shard", "1"),)] == 2
    assert got["chunkwise_kv_bytes_budget", (("shard", "1"),)] == 9
    assert {name: got[f"chunkwise_{name}", (("shard", "1"),)] for name in counts} == counts
    ratios = [got["chunkwise_kv_compression_ratio", (("shard", shard),)] for shard in "01"]
    assert ratios == [1.0, 0.25], "with nothing held there is nothing to compare"
    metrics.shard_states([ShardState(), ShardState()])
    assert samples(metrics.render().decode())["chunkwise_kv_pages", label] == 0

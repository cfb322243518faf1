"""A cache too small for all at once, over live processes: two shards, requests that come together, nobody notices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conftest import TinyWorld
from e2e.conftest import Server, running

POLICY = """
[chunker]
min_length = 4
max_length = 12
[kv]
kind = "int8"
when = "always"
recent_tokens = 16
block_tokens = 32
"""
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"adapter_id": "a16"},
    {"do_sample": True, "seed": 3, "top_p": 0.9},
    {"adapter_id": "a8", "repetition_penalty": 1.3},
    {"adapter_id": "a4", "do_sample": True, "seed": 4},
    {"grammar": {"type": "regex", "value": "[a-z ]{90,100}"}},
)


def answer(server: Server, place: int) -> tuple[list[int], list[dict[str, Any]]]:
    """Tokens and chunks of one of several different requests."""
    parameters = KINDS[place] | {"max_new_tokens": 80, "details": True, "chunk_details": True}
    details = server.generate(f"{place} {TEXT}"[: 30 + 8 * place], **parameters)["details"]
    return [token["id"] for token in details["tokens"]], details["chunks"]


def test_requests_that_are_pre_empted_get_the_answers_they_get_alone(tiny: TinyWorld, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    flags = ("--num-shard=2", f"--policy={policy}", "--max-batch-total-tokens=224", "--kv-growth-reserve=2")
    with running(tiny, tmp_path / "log", *flags) as server:
        alone = [answer(server, place) for place in range(len(KINDS))]
        assert sum(server.metric("chunkwise_preemptions_total").values()) == 0
        with ThreadPoolExecutor(len(KINDS)) as pool:
            together = list(pool.map(lambda place: answer(server, place), range(len(KINDS))))
        assert together == alone
        assert sum(server.metric("chunkwise_preemptions_total").values()) > 0
        assert sum(server.metric("chunkwise_kv_rewritten_pages").values()) > 0
        assert set(server.metric("chunkwise_kv_compression_ratio").values()) == {1.0}, "nothing is held any more"
    assert {chunk["kv"] for _, chunks in together for chunk in chunks} == {"full", "int8"}

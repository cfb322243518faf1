"""Checklist items 10 to 18: what a router asks before it serves anybody."""

from __future__ import annotations

import grpc
import pytest

from chunkwise.pb import generate_pb2 as pb
from conformance.conftest import Door
from conformance.player import Player
from tgi_router import TgiRouter, warmup_request


def test_item_10_service_discovery_lists_the_own_socket_and_all_can_be_reached(door: Door) -> None:
    with TgiRouter(door.uds_path) as router:
        assert f"unix://{door.uds_path}-0" in router.urls
        assert len(set(router.urls)) == len(router.urls) == len(router.shards)
        for shard in router.shards:
            shard.Health(pb.HealthRequest(), timeout=5)


def test_item_11_clear_cache_always_succeeds(player: Player) -> None:
    player.router.clear()
    player.router.clear()
    player.router.clear(12345)
    player.prefill(player.request(), id=0)
    player.router.clear(0)
    player.router.clear(0)


def test_item_12_info_has_a_block_size_and_what_is_unset_is_absent(player: Player) -> None:
    assert player.info.block_size >= 1
    assert not player.info.HasField("window_size")
    request = player.request(new=2)
    step = player.prefill(request)
    assert not step.generations[request.id].HasField("generated_text")
    assert step.batch is not None
    step = player.decode(step.batch)
    assert player.follow(step) is None
    assert not player.answer(request.id).end.HasField("seed"), "a greedy answer has no seed"


@pytest.mark.parametrize("limits", [{"max_input_tokens": 100, "max_total_tokens": 200}, {"max_total_tokens": 300}, {}])
def test_item_13_warmup_echoes_the_limits_it_got_and_infers_the_others(door: Door, limits: dict[str, int]) -> None:
    with door.warmed(**limits) as player:
        answer = player.router.limits
        assert {name: getattr(answer, name) for name in limits} == limits
        assert 1 <= answer.max_input_tokens < answer.max_total_tokens
        player.run(player.request(answer.max_input_tokens // 2))


def test_item_14_warmup_as_the_router_sends_it(door: Door) -> None:
    limits = {"max_prefill_tokens": 100, "max_input_tokens": 60, "max_total_tokens": 120}
    first, second = warmup_request(**limits).batch.requests
    assert [request.truncate for request in (first, second)] == [60, 40]
    assert first.id == second.id == 0
    assert first.input_chunks.chunks[1].HasField("image")
    assert first.parameters.watermark
    assert first.prefill_logprobs
    assert first.top_n_tokens == 20
    assert not first.blocks
    assert not first.slots
    with door.warmed(**limits) as player:
        player.run(player.request())


def test_item_15_warmup_with_a_wrapped_max_new_tokens(door: Door) -> None:
    (request,) = warmup_request(256, None, 100).batch.requests
    assert request.stopping_parameters.max_new_tokens >= 2**31
    with door.warmed(256, max_total_tokens=100) as player:
        assert player.router.limits.max_total_tokens == 100
        player.run(player.request())


def test_item_16_after_warmup_the_cache_is_empty_and_ids_start_at_0(door: Door) -> None:
    with door.warmed() as player:
        with pytest.raises(grpc.RpcError):
            player.decode(pb.CachedBatch(id=0))
        assert player.held() == 0
        request = player.request(new=3)
        assert request.id == 0
        step = player.prefill(request, id=0)
        assert step.batch is not None
        assert step.batch.id == 0
        player.finish(step.batch, request)


@pytest.mark.parametrize("limits", [{}, {"max_total_tokens": 100}, {"max_input_tokens": 80, "max_total_tokens": 120}])
def test_item_17_a_request_of_max_total_tokens_fits_beside_the_reserved_block(
    door: Door, limits: dict[str, int]
) -> None:
    with door.warmed(64, **limits) as player:
        answer, size = player.router.limits, player.info.block_size
        blocks = -(-(answer.max_total_tokens - 1 + player.info.speculate) // size)
        assert answer.max_supported_total_tokens >= max(64, size * (blocks + 1))
        longest = player.request(answer.max_input_tokens, answer.max_total_tokens - answer.max_input_tokens)
        player.run(longest)


def test_item_18_messages_of_more_than_4_mib_are_accepted(door: Door) -> None:
    with door.warmed() as player:
        large = warmup_request(64)
        large.batch.requests[0].input_chunks.chunks[1].image.data = bytes(5 * 2**20)
        for call in [shard.Warmup.future(large) for shard in player.router.shards]:
            assert call.result(timeout=60).max_total_tokens
        player.router.clear()

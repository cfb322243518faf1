"""Checklist items 19 to 36: Prefill, Decode, FilterBatch, ClearCache and Health."""

from __future__ import annotations

import time

import grpc
import pytest

from chunkwise.pb import generate_pb2 as pb
from conformance.conftest import Door
from conformance.player import Player
from tgi_router import U64_MAX, liveness_request


def known(player: Player, batch_id: int) -> bool:
    """Whether the server holds a batch; asking keeps none of its requests."""
    try:
        player.decode(pb.CachedBatch(id=batch_id))
    except grpc.RpcError:
        return False
    return True


def mixed(player: Player, count: int, new: int = 6) -> list[pb.Request]:
    """Requests of different lengths with the base model and all adapters in turn."""
    adapters: list[str | None] = [None, *player.adapters]
    return [player.request(9 + 7 * i, new + i, seed=i, adapter_id=adapters[i % len(adapters)]) for i in range(count)]


def alike(player: Player, tokens: int) -> list[pb.Request]:
    """Requests that differ in the adapter alone."""
    return [player.request(tokens, 20, seed=tokens, adapter_id=adapter) for adapter in (None, *player.adapters)]


def test_item_19_prefill_of_one_request_gives_one_token_and_its_batch(player: Player) -> None:
    request = player.request()
    step = player.prefill(request, id=7)
    (generation,) = step.generations.values()
    tokens = generation.tokens
    assert len(tokens.ids) == len(tokens.logprobs) == len(tokens.texts) == len(tokens.is_special) == 1
    assert tokens.logprobs[0] <= 0
    assert not generation.HasField("generated_text")
    assert step.batch is not None
    assert (step.batch.id, list(step.batch.request_ids), step.batch.size) == (7, [request.id], 1)


def test_item_20_max_new_tokens_one_finishes_in_prefill(player: Player) -> None:
    request = player.request(new=1)
    step = player.prefill(request, id=3)
    end = player.answer(request.id).end
    assert (end.finish_reason, end.generated_tokens) == (pb.FINISH_REASON_LENGTH, 1)
    assert player.follow(step) is None
    assert not known(player, 3)


def test_item_21_decodes_produce_exactly_max_new_tokens(player: Player) -> None:
    for new in (2, 3, 17):
        request = player.request(new=new)
        step, decodes = player.prefill(request), 0
        while (cached := player.follow(step)) is not None:
            step = player.decode(cached)
            decodes += 1
        answer = player.answer(request.id)
        assert len(answer.ids) == answer.end.generated_tokens == new
        assert decodes == new - 1 or player.info.speculate


def test_item_22_decode_of_two_batches_merges_them(player: Player) -> None:
    one, two = player.request(seed=1), player.request(seed=2)
    first, second = player.prefill(one).batch, player.prefill(two).batch
    assert first is not None
    assert second is not None
    step = player.decode(first, second)
    assert step.batch is not None
    assert set(step.generations) == set(step.batch.request_ids) == {one.id, two.id}
    assert step.batch.size == 2
    assert not any(known(player, batch.id) for batch in (first, second) if batch.id != step.batch.id)
    player.finish(step.batch, one, two)


def test_item_23_prefill_with_a_cached_batch_advances_both(player: Player) -> None:
    if not player.info.support_chunking:
        pytest.skip("Info says that the server does not support chunking, so no router sends this")
    old, new = player.request(seed=1), player.request(seed=2)
    step = player.prefill(new, cached=player.prefill(old).batch)
    assert set(step.generations) == {old.id, new.id}
    assert step.batch is not None
    assert list(step.batch.request_ids) == [old.id, new.id]
    assert player.finish(step.batch, old)[0].ids == player.alone(old).ids


@pytest.mark.parametrize(("tokens", "chunk"), [(61, 16), (300, 96)])
def test_item_24_a_chunked_prompt_answers_late_and_as_a_whole_one(door: Door, tokens: int, chunk: int) -> None:
    """Each of the two runs starts with an empty prefix cache, lest one reuse what the other computed."""
    with door.warmed(max_prefill_tokens=2048) as player:
        if not player.info.support_chunking:
            pytest.skip("Info says that the server does not support chunking, so no router sends chunk_len")
        whole = player.run(*alike(player, tokens))
    with door.warmed() as player:
        chunked, other = alike(player, tokens), player.request(12, 60, seed=1)
        cached = player.prefill(other).batch
        for request in chunked:
            request.chunk_len = chunk
            step = player.prefill(request, cached=cached)
            assert other.id in step.generations
            assert request.id not in step.generations
            cached = player.follow(step)
            while cached is not None and not player.answer(request.id).generations:
                cached = player.follow(player.decode(cached))
        for answer, expected in zip(player.finish(cached, *chunked), whole, strict=True):
            assert answer.ids == expected.ids
            # Keys and values that are compressed at another step, or another rank, would make ten times as much.
            assert answer.logprobs == pytest.approx(expected.logprobs, abs=2e-3)


def test_item_25_current_tokens_are_those_of_the_next_step(player: Player) -> None:
    requests = [player.request(seed=i) for i in range(3)]
    step = player.prefill(*requests)
    assert step.batch is not None
    assert step.batch.current_tokens == 3
    if player.info.support_chunking:
        late = player.request(60, chunk_len=16)
        step = player.prefill(late, cached=step.batch)
        assert step.batch is not None
        assert step.batch.current_tokens == 3 + 44
        kept = player.filter(step.batch.id, [late.id])
        assert kept.current_tokens == 44


def test_item_26_filter_keeps_order_and_state(player: Player) -> None:
    requests = mixed(player, 6)
    cached = player.prefill(*requests).batch
    assert cached is not None
    kept = [id for i, id in enumerate(cached.request_ids) if i % 2]
    rest = player.filter(cached.id, list(reversed(kept)))
    assert list(rest.request_ids) == kept
    staying = [request for request in requests if request.id in kept]
    answers = player.finish(rest, *staying)
    assert [answer.ids for answer in answers] == [player.alone(request).ids for request in staying]


def test_item_27_filter_answers_with_the_batch_and_an_unknown_one_is_an_error(player: Player) -> None:
    one, two = player.request(seed=1), player.request(seed=2)
    step = player.prefill(one, two, id=5)
    rest = player.filter(5, [two.id])
    assert (rest.id, list(rest.request_ids), rest.size) == (5, [two.id], 1)
    assert step.batch is not None
    assert rest.max_tokens < step.batch.max_tokens
    with pytest.raises(grpc.RpcError):
        player.filter(99, [two.id])
    player.finish(rest, two)


def test_item_28_decode_of_nothing_or_the_unknown_is_an_error(player: Player) -> None:
    request = player.request()
    cached = player.prefill(request).batch
    assert cached is not None
    with pytest.raises(grpc.RpcError):
        player.decode()
    with pytest.raises(grpc.RpcError):
        player.decode(pb.CachedBatch(id=99))
    player.finish(cached, request)
    player.run(player.request(seed=2))


def test_item_29_after_an_error_nothing_leaks_and_health_recovers(player: Player) -> None:
    with pytest.raises(grpc.RpcError):
        player.prefill(player.request(), cached=pb.CachedBatch(id=99), id=4)
    player.router.clear(4)
    assert not known(player, 4)
    assert player.held() == 0
    player.probe()
    for shard in player.router.shards:
        shard.Health(pb.HealthRequest(), timeout=5)
    player.run(player.request())


def test_item_30_a_liveness_probe_beside_a_decode_harms_nobody(player: Player) -> None:
    requests = mixed(player, 5, new=6)
    cached = player.prefill(*requests).batch
    while cached is not None:
        probes = [shard.Prefill.future(liveness_request()) for shard in player.router.shards]
        cached = player.follow(player.decode(cached))
        for probe in probes:
            assert all(g.request_id == U64_MAX for g in probe.result(timeout=30).generations)
    assert not known(player, U64_MAX)
    for request in requests:
        assert player.answer(request.id).ids == player.alone(request).ids


def test_item_31_health_answers_during_a_long_prefill(door: Door) -> None:
    with door.warmed(max_prefill_tokens=8000) as player:
        batch = player.batch([player.request(400, 2, seed=i, adapter_id=None) for i in range(16)])
        steps = [shard.Prefill.future(pb.PrefillRequest(batch=batch)) for shard in player.router.shards]
        probes = 0
        while not all(step.done() for step in steps):
            began = time.monotonic()
            player.router.shards[-1].Health(pb.HealthRequest(), timeout=1.0)
            assert time.monotonic() - began < 1.0
            probes += 1
            time.sleep(0.01)
        assert probes > 1
        assert sum(len(step.result().generations) for step in steps) == 16
        player.router.clear()


def test_item_32_an_answer_does_not_depend_on_the_batch(player: Player) -> None:
    requests = mixed(player, 6)
    alone = [player.alone(request).ids for request in requests]
    together = player.run(*[player.again(request) for request in requests])
    assert [answer.ids for answer in together] == alone
    cached = player.follow(player.prefill(requests[0]))
    for request in requests[1:]:
        joining = player.follow(player.prefill(request))
        cached = player.follow(player.decode(*[batch for batch in (cached, joining) if batch is not None]))
    assert [answer.ids for answer in player.finish(cached, *requests)] == alone


def test_item_33_block_0_and_freed_slots_are_never_needed(player: Player) -> None:
    """Between two steps others come, write and go: a probe into slot 0, and requests in blocks that were freed."""
    requests = mixed(player, 3, new=8)
    alone = [player.alone(request).ids for request in requests]
    cached = player.follow(player.prefill(*requests))
    turn = 0
    while cached is not None:
        player.probe()
        player.run(player.request(40, 3, seed=50 + turn))
        cached = player.follow(player.decode(cached))
        turn += 1
    assert [player.answer(request.id).ids for request in requests] == alone


def test_item_34_a_claim_of_cached_tokens_is_used_only_if_true(player: Player) -> None:
    if not (player.info.use_prefix_caching or player.tells_errors):
        pytest.skip("Info says that prefixes are not cached, so no router claims any")
    size = player.info.block_size
    for adapter in (None, *player.adapters):
        fresh = player.request(3 * size + 2, 3, seed=70, adapter_id=adapter)
        claimed = player.again(fresh)
        claimed.cache_len = 2 * size
        (false,) = player.run(claimed)
        honest = player.again(fresh)
        del honest.blocks[:], honest.slots[:]
        honest.blocks.extend(claimed.blocks)
        honest.slots.extend(claimed.slots)
        honest.cache_len = honest.truncate - 1
        (true,) = player.run(honest)
        assert true.ids == false.ids == player.alone(fresh).ids


def test_item_35_requests_without_blocks_and_slots_are_served(player: Player) -> None:
    request = player.request(new=6)
    bare = player.again(request)
    del bare.blocks[:], bare.slots[:]
    step = player.prefill(bare)
    assert player.finish(player.follow(step), bare)[0].ids == player.alone(request).ids


def test_item_36_over_all_shards_each_request_is_reported_once(player: Player) -> None:
    """That no two shards report the same request, `Player` checks in every answer."""
    requests = mixed(player, 6, new=3)
    step = player.prefill(*requests)
    while step.batch is not None:
        assert set(step.generations) >= set(step.batch.request_ids)
        cached = player.follow(step)
        assert cached is not None
        step = player.decode(cached)
    assert all(player.answer(request.id).ended for request in requests)

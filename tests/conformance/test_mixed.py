"""The headline: 64 requests that join, merge, filter and finish in random order, with four adapters and steering on,
equal each request alone, token for token."""

from __future__ import annotations

import random

import pytest

from chunkwise.pb import generate_pb2 as pb
from conformance.conftest import Door
from conformance.player import Answer, Player

# Two best tokens whose log-probabilities differ by less may change places by the order of floating-point sums.
TIE = 1e-4


def asked(player: Player, seed: int) -> list[pb.Request]:
    """64 requests; some prompts share their beginning, and some are long enough for compressed keys and values."""
    draw = random.Random(seed)
    adapters: list[str | None] = [None, *player.adapters]
    return [
        player.request(
            draw.choice([draw.randint(2, 40), draw.randint(40, 150)]),
            draw.randint(1, 8),
            seed=draw.randint(0, 40),
            adapter_id=adapters[i % len(adapters)],
            top_n_tokens=2,
        )
        for i in range(64)
    ]


def traffic(player: Player, requests: list[pb.Request], seed: int) -> set[int]:
    """Serves all requests in random order; the ids of those whose clients left before the end."""
    draw = random.Random(seed)
    waiting, running, left = list(requests), list[pb.CachedBatch](), set[int]()
    draw.shuffle(waiting)
    while waiting or running:
        if waiting and (not running or draw.random() < 0.6):
            count = draw.randint(1, 6)
            joining, waiting = waiting[:count], waiting[count:]
            joins = running and player.info.support_chunking and draw.random() < 0.6
            cached = running.pop(draw.randrange(len(running))) if joins else None
            step = player.prefill(*joining, cached=cached)
        else:
            draw.shuffle(running)
            count = draw.randint(1, len(running))
            step = player.decode(*running[:count])
            del running[:count]
        cached = player.follow(step)
        if cached is not None and draw.random() < 0.15:
            ids = list(cached.request_ids)
            leaving = draw.choice(ids)
            if player.answer(leaving).generations and len(ids) > 1:
                player.leave(leaving)
                left.add(leaving)
                cached = player.filter(cached.id, [id for id in draw.sample(ids, len(ids)) if id != leaving])
        running += [] if cached is None else [cached]
    return left


def difference(alone: Answer, mixed: Answer) -> str:
    """Where two answers part, and whether that is a tie of the two best tokens; empty if they do not."""
    for place, (one, other) in enumerate(zip(alone.ids, mixed.ids, strict=False)):
        if one != other:
            best, second = alone.generations[place].top_tokens[0].logprobs[:2]
            return f"token {place} is {other} instead of {one}: {'a tie' if best - second < TIE else 'a bug'}"
    return ""


def test_64_requests_in_random_order_equal_each_alone(door: Door, seed: int = 1) -> None:
    """Alone and mixed start with an empty prefix cache, so that neither reads what the other computed."""
    with door.warmed(max_prefill_tokens=1024) as player:
        alone = [player.alone(request) for request in asked(player, seed)]
    with door.warmed() as player:
        requests = asked(player, seed)
        left = traffic(player, requests, seed)
        assert 0 < len(left) < 32
        found = {}
        for request, expected in zip(requests, alone, strict=True):
            answer = player.answer(request.id)
            assert answer.ended or request.id in left
            found[request.id] = difference(expected, answer)
            assert len(answer.ids) == len(expected.ids) or request.id in left
        assert not any(found.values()), {id: text for id, text in found.items() if text}
        assert player.held() == 0


def test_an_answer_does_not_depend_on_how_prompts_are_cut_into_steps(door: Door) -> None:
    """How long prompts are cut follows from who shares the step. Rank and compression must not follow from that."""
    with door.warmed(max_prefill_tokens=4096) as player:
        whole = player.run(*long_prompts(player))
    with door.warmed(max_prefill_tokens=96) as player:
        cut = player.run(*long_prompts(player))
    for one, other in zip(whole, cut, strict=True):
        assert not difference(one, other)
        # Rounding alone makes 1e-5, and where it tips an 8-bit value over, 1e-3.
        assert other.logprobs == pytest.approx(one.logprobs, abs=3e-3)


def long_prompts(player: Player) -> list[pb.Request]:
    """Requests of all adapters whose keys and values are partly compressed by the end."""
    draw = random.Random(1)
    names: list[str | None] = [*player.adapters] or [None]
    return [
        player.request(draw.randint(100, 300), 24, seed=1000 + i, adapter_id=names[i % len(names)], top_n_tokens=2)
        for i in range(12)
    ]

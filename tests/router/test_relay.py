from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkwise.config.policy import SteeringPolicy
from chunkwise.config.settings import Limits
from chunkwise.core import (
    ChunkDecision,
    GenerationFailed,
    GenerationRequest,
    InvalidRequest,
    RequestError,
    SamplingParams,
    SteeringUpdate,
    StepResult,
    StepSignals,
    StoppingParams,
)
from chunkwise.router.helm import Helm
from chunkwise.router.metrics import Metrics
from chunkwise.router.relay import Relay
from chunkwise.router.shard_group import ShardLost
from chunkwise.steering import SteeringController
from chunkwise.tokenizer import Tokenizer
from fakes import ADAPTERS, Call, FakeSequence, FakeShards, toy_text
from routing import POLICY, write_tokenizer

U64_MAX = 2**64 - 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("model")))


async def relay_to(shards: FakeShards, tokenizer: Tokenizer, policy: SteeringPolicy | None = POLICY) -> Relay:
    """A relay after Warmup; the calls so far are struck off the record."""
    adapters = {adapter.adapter_id: adapter for adapter in ADAPTERS}
    controller = SteeringController(policy) if policy is not None else None
    relay = Relay(
        shards,
        Helm(shards, controller, adapters, Metrics(128)),
        tokenizer,
        base_names={"toy/model", "model", "law"},
        adapter_names=adapters,
    )
    await relay.warmup(Limits(max_batch_prefill_tokens=64))
    shards.calls.clear()
    return relay


def ask(id: int, text: str = "hello", new: int = 4, **changes: object) -> GenerationRequest:
    """A request as a TGI router sends it: text, no token ids."""
    base = GenerationRequest(id, text, SamplingParams(), StoppingParams(new))
    return replace(base, **changes)  # type: ignore[arg-type]


def expected(tokenizer: Tokenizer, request: GenerationRequest) -> str:
    """What the toy model answers."""
    ids = tokenizer.encode(request.inputs, add_special_tokens=request.add_special_tokens, truncate=request.truncate)
    return toy_text(replace(request, prompt_ids=tuple(ids)), request.stopping.max_new_tokens)


@dataclass
class Texts:
    """What the caller has received, by its own request ids."""

    letters: dict[int, str] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)

    def take(self, result: StepResult) -> StepResult:
        for generation in result.generations:
            id = generation.request_id
            assert id not in self.ended, "nothing follows the end"
            self.letters[id] = self.letters.get(id, "") + generation.token.text
            if generation.text is not None:
                self.ended[id] = generation.text.text
        return result


async def test_any_ids_are_mapped_to_ours_and_back(tokenizer: Tokenizer) -> None:
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    first = await relay.prefill(0, [ask(0), ask(U64_MAX, "other")], None)
    assert [generation.request_id for generation in first.generations] == [0, U64_MAX]
    assert first.batch is not None
    assert (first.batch.id, first.batch.request_ids) == (0, (0, U64_MAX))
    # The liveness probe comes while batch 0 is live.
    probe = ask(U64_MAX, "liveness", 1, truncate=1, add_special_tokens=False)
    alive = await relay.prefill(U64_MAX, [probe], None)
    assert alive.batch is None
    assert [g.request_id for g in alive.generations] == [U64_MAX]
    assert [call.ids for call in shards.named("prefill")] == [(1, 2), (3,)]
    assert (await relay.decode([0])).batch is not None


async def test_when_pages_run_out_requests_are_compressed_and_none_is_taken_out(tokenizer: Tokenizer) -> None:
    """Whom to admit is the caller's business; here it has let in more than may grow much longer."""
    shards = FakeShards(kv_pages=20)
    relay = await relay_to(shards, tokenizer, replace(POLICY, kv=replace(POLICY.kv, when="pressure")))
    texts = Texts()
    asked = [ask(id, "hello" * 3, 34) for id in range(2)]
    result = texts.take(await relay.prefill(0, asked, None))
    seen: list[tuple[int, set[int]]] = []
    while result.batch is not None:
        assert result.batch.free_pages is not None
        told = {decision.request_id for update in shards.updates for decision in update.kv}
        seen.append((result.batch.free_pages, told))
        result = texts.take(await relay.decode([0]))
    assert texts.ended == {each.id: expected(tokenizer, each) for each in asked}
    assert not any(told for free, told in seen[:5]), "while there is room"
    assert seen[-1][1] == {1, 2}
    assert len(shards.named("prefill")) == 1
    assert not shards.named("filter_batch")


async def test_equal_ids_in_one_batch_are_different_requests(tokenizer: Tokenizer) -> None:
    """As in Warmup, where all ids are 0."""
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    result = await relay.prefill(0, [ask(0, "a", 2), ask(0, "b", 3)], None)
    assert [generation.request_id for generation in result.generations] == [0, 0]
    assert result.batch is not None
    assert result.batch.request_ids == (0, 0)
    assert (await relay.filter(0, [0])).request_ids == (0, 0)
    assert (await relay.filter(0, [])).request_ids == ()
    await relay.clear(None)
    shards.check_empty()


async def test_prompts_are_tokenised_once_and_as_a_shard_would(tokenizer: Tokenizer) -> None:
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    requests = [
        ask(0, "some words"),
        ask(1, "some words", add_special_tokens=False),
        ask(2, "some words", truncate=4),
        ask(3, "", prompt_ids=(5, 6, 7)),
    ]
    await relay.prefill(0, requests, None)
    (batch,) = shards.batches.values()
    assert [sequence.request.prompt_ids for sequence in batch] == [
        tuple(tokenizer.encode("some words")),
        tuple(tokenizer.encode("some words", add_special_tokens=False)),
        tuple(tokenizer.encode("some words", truncate=4)),
        (5, 6, 7),
    ]


@pytest.mark.parametrize(
    ("adapter_id", "served"),
    [(None, None), ("toy/model", None), ("model", None), ("law", "law"), ("med", "med"), ("nobody", "nobody")],
)
async def test_the_models_own_name_means_no_adapter(
    tokenizer: Tokenizer, adapter_id: str | None, served: str | None
) -> None:
    """OpenAI clients of a TGI router send it; a resident adapter of that name is meant first."""
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    await relay.prefill(0, [ask(0, adapter_id=adapter_id)], None)
    (batch,) = shards.batches.values()
    assert batch[0].request.adapter_id == served


async def test_batches_live_side_by_side_until_a_decode_merges_them(tokenizer: Tokenizer) -> None:
    shards, texts = FakeShards(), Texts()
    relay = await relay_to(shards, tokenizer)
    wanted = [ask(0, "first", 6, adapter_id="law"), ask(1, "second", 3), ask(2, "third", 5, adapter_id="med")]
    texts.take(await relay.prefill(0, wanted[:1], None))
    texts.take(await relay.prefill(1, wanted[1:2], None))
    merged = texts.take(await relay.decode([0, 1, 0])).batch
    assert merged is not None
    assert (merged.id, merged.request_ids) == (0, (0, 1))
    with pytest.raises(InvalidRequest, match=r"\[1\] are not cached"):
        await relay.decode([0, 1])
    joined = texts.take(await relay.prefill(2, wanted[2:], 0)).batch
    assert joined is not None
    assert joined.id == 0
    while joined is not None:
        joined = texts.take(await relay.decode([0])).batch
    assert texts.ended == {request.id: expected(tokenizer, request) for request in wanted}
    await relay.clear(None)
    shards.check_empty()


async def test_a_failed_step_ends_its_batches_everywhere_and_no_others(tokenizer: Tokenizer) -> None:
    shards, texts = FakeShards(), Texts()
    relay = await relay_to(shards, tokenizer)
    survivor = ask(5, "survivor", 6, adapter_id="law")
    texts.take(await relay.prefill(5, [survivor], None))
    texts.take(await relay.prefill(0, [ask(0, adapter_id="law")], None))
    texts.take(await relay.prefill(1, [ask(1)], None))
    shards.failures["decode"] = [GenerationFailed("no memory left")]
    with pytest.raises(GenerationFailed, match="no memory left"):
        await relay.decode([0, 1])
    for gone in (0, 1):
        with pytest.raises(InvalidRequest, match="not cached"):
            await relay.decode([gone])
        await relay.clear(gone)
    assert [call.ids for call in shards.named("clear_cache")] == [(2,), (3,)]
    batch = texts.take(await relay.decode([5])).batch
    shards.failures["prefill"] = [GenerationFailed("no memory left")]
    with pytest.raises(GenerationFailed):
        await relay.prefill(6, [ask(6)], None)
    while batch is not None:
        batch = texts.take(await relay.decode([5])).batch
    assert texts.ended == {5: expected(tokenizer, survivor)}
    shards.failures["prefill"] = [GenerationFailed("no memory left")]
    await relay.clear(None)
    shards.check_empty()


async def test_a_failed_join_takes_the_cached_batch_along(tokenizer: Tokenizer) -> None:
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    await relay.prefill(0, [ask(0)], None)
    shards.failures["prefill"] = [GenerationFailed("no memory left")]
    with pytest.raises(GenerationFailed):
        await relay.prefill(1, [ask(1)], 0)
    assert [call.ids for call in shards.named("clear_cache")] == [(1,), (2,)]
    with pytest.raises(InvalidRequest, match="not cached"):
        await relay.decode([0])
    assert (await relay.prefill(1, [ask(1)], None)).batch is not None
    await relay.clear(None)
    shards.check_empty()


async def test_a_failed_filter_ends_its_batch_and_steering_goes_on_for_others(tokenizer: Tokenizer) -> None:
    shards, texts = FakeShards(), Texts()
    relay = await relay_to(shards, tokenizer)
    survivor = ask(5, "survivor", 12, adapter_id="law")
    texts.take(await relay.prefill(0, [ask(0), ask(1)], None))
    batch = texts.take(await relay.prefill(5, [survivor], None)).batch
    shards.failures["filter_batch"] = [GenerationFailed("out of luck")]
    with pytest.raises(GenerationFailed, match="out of luck"):
        await relay.filter(0, [1])
    while batch is not None:
        batch = texts.take(await relay.decode([5])).batch
    assert texts.ended == {5: expected(tokenizer, survivor)}
    await relay.clear(None)
    shards.check_empty()


async def test_a_lost_shard_is_not_repaired(tokenizer: Tokenizer) -> None:
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    shards.failures["prefill"] = [ShardLost("gone")]
    with pytest.raises(ShardLost):
        await relay.prefill(0, [ask(0)], None)
    assert not shards.named("clear_cache")


async def test_what_is_unknown(tokenizer: Tokenizer) -> None:
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    await relay.prefill(3, [ask(0)], None)
    for act in (relay.decode([9]), relay.decode([3, 9]), relay.filter(9, [0]), relay.prefill(4, [ask(1)], 9)):
        with pytest.raises(InvalidRequest, match=r"\[9\] are not cached; cached are \[3\]"):
            await act
    with pytest.raises(InvalidRequest, match="names no batch"):
        await relay.decode([])
    await relay.clear(9)
    assert [call.name for call in shards.calls if call.name != "steer"] == ["prefill"]
    assert (await relay.filter(3, [0, 77])).request_ids == (0,)
    assert (await relay.decode([3])).batch is not None


async def test_filter_releases_on_every_shard_before_the_next_step(tokenizer: Tokenizer) -> None:
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    await relay.prefill(0, [ask(10, adapter_id="law"), ask(11), ask(12, adapter_id="med")], None)
    assert shards.steered == {1, 3}
    rest = await relay.filter(0, [12, 11])
    assert (rest.id, rest.request_ids) == (0, (11, 12))
    assert shards.steered == {3}
    await relay.clear(0)
    assert shards.steered == set()
    shards.check_empty()


async def test_clear_all_reaches_the_shards_even_if_nothing_is_known(tokenizer: Tokenizer) -> None:
    """What an earlier router process left behind."""
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    for _ in range(2):
        await relay.clear(None)
    assert shards.calls == [Call("clear_cache", (), 0)] * 2


async def test_a_batch_id_that_comes_again_replaces_what_it_named(tokenizer: Tokenizer) -> None:
    """As after a restart of the router whose ClearCache was lost."""
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    await relay.prefill(0, [ask(0, adapter_id="law")], None)
    again = await relay.prefill(0, [ask(0, "new", adapter_id="law")], None)
    assert again.batch is not None
    assert len(shards.batches) == 1
    await relay.clear(0)
    await relay.clear(None)
    shards.check_empty()


async def test_warmup_forgets_what_was_live(tokenizer: Tokenizer) -> None:
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer)
    await relay.prefill(0, [ask(0, adapter_id="law")], None)
    limits = await relay.warmup(Limits(max_input_tokens=50, max_total_tokens=60))
    assert (limits.max_input_tokens, limits.max_total_tokens) == (50, 60)
    shards.check_empty()


@pytest.mark.parametrize("text", ["", "far too long " * 20])
async def test_a_prompt_that_the_shards_will_refuse_is_not_planned(tokenizer: Tokenizer, text: str) -> None:
    shards = FakeShards(step_tokens=1000, errors={text: RequestError("not this one", "validation")})
    relay = await relay_to(shards, tokenizer)
    refused = await relay.prefill(0, [ask(4, text, adapter_id="law", add_special_tokens=False)], None)
    (generation,) = refused.generations
    assert (generation.request_id, generation.error) == (4, RequestError("not this one", "validation"))
    assert refused.batch is None
    assert not shards.updates


async def test_an_error_of_one_request_is_passed_on_and_releases_it(tokenizer: Tokenizer) -> None:
    shards = FakeShards(errors={"bad": RequestError("not this one", "generation")})
    relay = await relay_to(shards, tokenizer)
    result = await relay.prefill(0, [ask(1, "bad", adapter_id="law"), ask(2, "good", adapter_id="law")], None)
    assert [g.error is not None for g in result.generations] == [True, False]
    assert result.batch is not None
    assert result.batch.request_ids == (2,)
    await relay.decode([0])
    assert shards.steered == {2}


async def test_without_steering_the_numbers_are_tgis(tokenizer: Tokenizer) -> None:
    shards = FakeShards()
    relay = await relay_to(shards, tokenizer, policy=None)
    await relay.prefill(0, [ask(0, new=2, adapter_id="law")], None)
    await relay.decode([0])
    assert shards.calls == [Call("prefill", (1,), 0, 0), Call("decode", (1,), 0, 0)]


class StrictShards(FakeShards):
    """Also checks, as a real shard does, that no decision comes too late."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fresh: list[ChunkDecision] = []
        self.checked = 0

    async def steer(self, update: SteeringUpdate) -> None:
        await super().steer(update)
        self.fresh.extend(update.chunks)

    async def _run(self, batch_id: int, sequences: list[FakeSequence], step: int) -> StepResult:
        computed = {s.request.id: s.computed for held in [sequences, *self.batches.values()] for s in held}
        for decision in self.fresh:
            assert decision.start >= computed.get(decision.request_id, 0)
            self.checked += 1
        self.fresh.clear()
        return await super()._run(batch_id, sequences, step)


@dataclass
class Caller:
    """A router that does, at random, everything that TGI's may do."""

    relay: Relay
    tokenizer: Tokenizer
    texts: Texts = field(default_factory=Texts)
    batches: dict[int, tuple[int, ...]] = field(default_factory=dict)
    asked: dict[int, GenerationRequest] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)

    async def act(self, data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(["prefill", "join", "decode", "decode", "decode", "filter", "clear"]))
        names = sorted(self.batches)
        if kind in ("prefill", "join"):
            await self._prefill(data, data.draw(st.sampled_from(names)) if kind == "join" and names else None)
        elif names and kind == "decode":
            chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            for name in chosen:
                del self.batches[name]
            self._take(await self.relay.decode(chosen))
        elif names:
            name = data.draw(st.sampled_from(names))
            ids = self.batches.pop(name)
            kept = data.draw(st.sets(st.sampled_from(ids))) if kind == "filter" else set()
            self.dropped |= set(ids) - kept
            if kept:
                batch = await self.relay.filter(name, kept)
                self.batches[name] = batch.request_ids
                assert batch.request_ids == tuple(id for id in ids if id in kept)
            else:
                await self.relay.clear(name)

    async def finish(self) -> None:
        while self.batches:
            chosen = list(self.batches)
            self.batches.clear()
            self._take(await self.relay.decode(chosen))

    async def _prefill(self, data: st.DataObject, cached: int | None) -> None:
        base = 1000 * len(self.asked)
        requests = [
            ask(
                base + i,
                data.draw(st.text("abc", min_size=1, max_size=12)),
                data.draw(st.integers(1, 14)),
                adapter_id=data.draw(st.sampled_from([None, "law", "med"])),
            )
            for i in range(data.draw(st.integers(1, 3)))
        ]
        self.asked |= {request.id: request for request in requests}
        if cached is not None:
            del self.batches[cached]
        self._take(await self.relay.prefill(base, requests, cached))

    def _take(self, result: StepResult) -> None:
        self.texts.take(result)
        if result.batch is not None:
            self.batches[result.batch.id] = result.batch.request_ids


@given(st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_the_router_does_every_answer_is_the_one_alone(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    shards = StrictShards(step_tokens=4)
    caller = Caller(await relay_to(shards, tokenizer), tokenizer)
    for _ in range(data.draw(st.integers(1, 25))):
        await caller.act(data)
    await caller.finish()
    assert caller.texts.ended.keys() | caller.dropped == caller.asked.keys()
    for id, text in caller.texts.ended.items():
        assert text == caller.texts.letters[id] == expected(tokenizer, caller.asked[id])
    for id in caller.dropped:
        assert expected(tokenizer, caller.asked[id]).startswith(caller.texts.letters.get(id, ""))
    await caller.relay.clear(None)
    shards.check_empty()


async def test_signals_are_observed_one_step_late_over_several_batches(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = StrictShards()
    observe = SteeringController.observe

    def recorded(self: SteeringController, signals: StepSignals) -> None:
        shards.calls.append(Call("observe", step=signals.step))
        observe(self, signals)

    monkeypatch.setattr(SteeringController, "observe", recorded)
    relay = await relay_to(shards, tokenizer)
    await relay.prefill(0, [ask(0, new=30, adapter_id="law")], None)
    await relay.decode([0])
    await relay.prefill(1, [ask(1, new=30, adapter_id="law")], None)
    await relay.decode([0])
    await relay.decode([0, 1])
    for _ in range(19):
        await relay.decode([0])
    order = [(call.name, call.step) for call in shards.named("prefill", "decode", "observe")]
    for step in range(1, 24):
        observed = order.index(("observe", step))
        assert order[observed - 1][1] == step + 1
    assert shards.checked > 4

"""The controller under the router's loop: one step of lag between signals and decisions, any mix of requests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from chunkwise.config.adapter_policy import AdapterPolicy, PriceTable
from chunkwise.config.policy import ChunkerPolicy, EstimatorPolicy, KvPolicy, RankPolicy, SteeringPolicy
from chunkwise.core import (
    AdapterInfo,
    ChunkDecision,
    KvDecision,
    KvFormat,
    SequenceSignals,
    SteeringUpdate,
    StepSignals,
)
from chunkwise.steering import ChunkReport, SteeringController, SteeringReport
from chunkwise.steering.kv_policy import kv_rule

ADAPTER = AdapterInfo(
    "a", "h", 32, (0, 2, 4, 8, 16, 32), (0.0, 0.3, 0.5, 0.7, 0.9, 1.0), (0.0, 2.0, 4.0, 8.0, 15.0, 31.0)
)


PRICE_ROWS = st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6).map(tuple)
SECTIONS = st.builds(
    lambda default, tokens, answer, own: AdapterPolicy(
        "h",
        ADAPTER.rungs,
        ADAPTER.kept_energy,
        answer,
        price_per_rank=0.01,
        prices=PriceTable(default, tokens),
        answer_tokens=own,
    ),
    PRICE_ROWS,
    st.dictionaries(st.integers(0, 9), PRICE_ROWS),
    st.sampled_from(ADAPTER.rungs),
    st.dictionaries(st.integers(0, 999), st.sampled_from(ADAPTER.rungs)),
)


@dataclass(frozen=True)
class Scenario:
    policy: SteeringPolicy
    requests: int
    seed: int
    results_before_signals: bool
    ahead: bool = False
    pressure: tuple[int, ...] = ()
    cuts: int = 0
    page_size: int = 1
    preempted: tuple[int, ...] = ()

    @property
    def tabled(self) -> bool:
        """Whether tokens of an answer have ranks of their own."""
        return any(section.answer_tokens for section in self.policy.adapters.values())

    @property
    def planned(self) -> bool:
        """Whether ranks are planned, so that only their changes are told, and where they change chunks are cut."""
        return bool(self.policy.adapters) or self.policy.rank.source == "roles"


@dataclass
class Request:
    """One request as the simulated loop sees it; ``computed`` counts the positions of all steps started so far,
    ``cuts`` says how its prompt is cut into them."""

    id: int
    prompt: list[int]
    adapter: AdapterInfo | None
    arrival: int
    new_tokens: int
    cuts: random.Random
    computed: int = 0
    generated: int = 0
    chunks: list[ChunkDecision] = field(default_factory=list)
    kv: list[KvDecision] = field(default_factory=list)
    report: SteeringReport | None = None


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    low = draw(st.integers(1, 12))
    chunker = ChunkerPolicy(
        min_length=low,
        max_length=low + draw(st.integers(0, 12)),
        threshold=draw(st.floats(0.001, 0.4)),
        smoothing_tokens=draw(st.floats(1.0, 8.0)),
    )
    policy = SteeringPolicy(
        estimator=EstimatorPolicy(gain=draw(st.floats(0.5, 8.0))),
        chunker=chunker,
        rank=RankPolicy(
            source=draw(st.sampled_from(["complexity", "roles"])),
            prompt_rung=draw(st.sampled_from([None, 2, 3, 32])),
            answer_rung=draw(st.sampled_from([None, 0, 2])),
            crossfade=draw(st.integers(0, 8)),
            energy_exponent=draw(st.sampled_from([0.0, 1.0])),
        ),
        kv=KvPolicy(
            kind=draw(st.sampled_from(["complexity", "complexity", "keep", "window", "full"])),
            when=draw(st.sampled_from(["always", "pressure"])),
            easy_below=draw(st.floats(0.0, 0.5)),
            hard_above=draw(st.floats(0.5, 1.0)),
            window_tokens=draw(st.integers(0, 40)),
            sink_tokens=draw(st.integers(0, 20)),
            recent_tokens=draw(st.integers(0, 30)),
            block_tokens=draw(st.integers(1, 30)),
        ),
        adapters={"a": draw(SECTIONS)} if draw(st.booleans()) else {},
    )
    return Scenario(
        policy,
        draw(st.integers(1, 5)),
        draw(st.integers(0, 2**32)),
        draw(st.booleans()),
        pressure=tuple(draw(st.lists(st.integers(0, 40), max_size=5))),
        page_size=draw(st.sampled_from([1, 4])),
    )


class Loop:
    """Flush, start step n, observe step n-1, take the results of step n; checks what must hold at every flush.

    Memory is short before the steps of ``pressure``. Before those of ``preempted`` the youngest of several requests is
    taken out, to be computed anew two steps later. With ``ahead``, the flush of step n+1 comes before the results of
    step n, unless something of all that happens between them.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.policy = scenario.policy
        self.page_size = scenario.page_size
        self.controller = SteeringController(scenario.policy, scenario.page_size)
        self.updates: list[SteeringUpdate] = []
        self._random = random.Random(scenario.seed)
        self._results_before_signals = scenario.results_before_signals
        self._ahead = scenario.ahead
        self._pressure = scenario.pressure
        self._preempted = scenario.preempted
        self._back: dict[int, Request] = {}
        self._cuts = random.Random(scenario.cuts)
        self._trailing = StepSignals(0)
        self.requests = [self._request(index) for index in range(scenario.requests)]

    def run(self) -> None:
        step, flushed = 0, False
        while any(request.report is None for request in self.requests):
            live = [request for request in self.requests if request.report is None and request.arrival <= step]
            for request in live:
                if request.arrival == step:
                    self.controller.admit(request.id, request.prompt, request.adapter)
            for _ in range(self._pressure.count(step)):
                self.controller.compress_next()
            live = self._running(step, live)
            if not flushed:
                self._flush()
            signals = StepSignals(step, tuple(self._compute(live)))
            if self._results_before_signals:
                self._take_results(live)
                self.controller.observe(self._trailing)
            else:
                self.controller.observe(self._trailing)
                plain = all(request.arrival != step + 1 for request in self.requests)
                quiet = step + 1 not in (*self._pressure, *self._preempted, *self._back)
                flushed = self._ahead and plain and quiet
                if flushed:
                    self._flush(ahead=True)
                self._take_results(live)
            self._trailing = signals
            step += 1
        self.controller.observe(self._trailing)
        self._flush()

    def _running(self, step: int, live: list[Request]) -> list[Request]:
        """The live requests that are computed in this step, after one has come back and one was taken out."""
        if step in self._back:
            self.controller.resume(self._back.pop(step).id)
        running = [request for request in live if request not in self._back.values()]
        if step in self._preempted and len(running) > 1:
            youngest = self._back[step + 2] = running.pop()
            self.controller.pause(youngest.id)
            youngest.computed, youngest.chunks, youngest.kv = 0, [], []
        return running

    def _request(self, index: int) -> Request:
        alphabet = self._random.choice([2, 10, 1000])
        return Request(
            id=100 + index,
            prompt=[self._random.randrange(alphabet) for _ in range(self._random.randint(1, 60))],
            adapter=self._random.choice([ADAPTER, ADAPTER, None]),
            arrival=self._random.randrange(20) + self._cuts.randrange(5),
            new_tokens=self._random.randint(1, 60),
            cuts=random.Random(self._cuts.random()),
        )

    def _flush(self, ahead: bool = False) -> None:
        update = self.controller.flush(ahead)
        if update is None:
            return
        self.updates.append(update)
        by_id = {request.id: request for request in self.requests}
        for chunk in update.chunks:
            request = by_id[chunk.request_id]
            assert request.report is None
            assert chunk.start >= request.computed
            request.chunks.append(chunk)
        for decision in update.kv:
            request = by_id[decision.request_id]
            assert request.report is None
            assert self.policy.kv.sink_tokens <= decision.start < decision.end
            assert decision.effective >= decision.end + self.policy.kv.protected_tokens
            assert decision.start % self.page_size == decision.end % self.page_size == 0
            assert decision.effective >= request.computed, "what it bears on is not computed"
            request.kv.append(decision)

    def _compute(self, live: list[Request]) -> Iterator[SequenceSignals]:
        for request in live:
            remaining = len(request.prompt) + request.generated - request.computed
            request.computed += request.cuts.randint(1, remaining)
            draw = random.Random(f"{request.prompt} {request.computed}")
            yield SequenceSignals(request.id, request.computed - 1, draw.random(), draw.choice([None, draw.random()]))

    def _take_results(self, live: list[Request]) -> None:
        for request in live:
            if request.computed < len(request.prompt) + request.generated:
                continue
            self.controller.extend(request.id, random.Random(request.computed).randrange(1000))
            request.generated += 1
            if request.generated == request.new_tokens:
                expected = self.controller.report(request.id, request.computed)
                request.report = self.controller.release(request.id)
                assert request.report == expected


@given(scenarios())
@settings(deadline=None, max_examples=150)
def test_updates_are_numbered_without_gaps_and_release_every_request_once(scenario: Scenario) -> None:
    loop = Loop(scenario)
    loop.run()
    assert [update.seq for update in loop.updates] == list(range(1, len(loop.updates) + 1))
    assert loop.controller.last_seq == len(loop.updates)
    released = [request_id for update in loop.updates for request_id in update.released]
    assert sorted(released) == [request.id for request in loop.requests]


@given(scenarios())
@settings(deadline=None, max_examples=150)
def test_chunks_tile_every_request_within_the_bounds(scenario: Scenario) -> None:
    loop = Loop(scenario)
    loop.run()
    low, high = scenario.policy.chunker.min_length, scenario.policy.chunker.max_length
    for request in loop.requests:
        report = request.report
        assert report is not None
        chunks = report.chunks
        assert (chunks[0].start, chunks[-1].end) == (0, request.computed)
        assert all(before.end == after.start for before, after in pairwise(chunks))
        lowest = 1 if scenario.planned and request.adapter is not None else low
        assert all(lowest <= chunk.end - chunk.start <= high for chunk in chunks[:-1])
        assert 1 <= chunks[-1].end - chunks[-1].start <= high
        weighted = sum((chunk.end - chunk.start) * chunk.rank for chunk in chunks)
        assert abs(report.mean_rank - weighted / request.computed) < 1e-9


def _gate(chunk: ChunkReport) -> tuple[float | None, float]:
    return chunk.rung, chunk.scale


@given(scenarios())
@settings(deadline=None, max_examples=150)
def test_decisions_are_the_reported_chunks_in_ascending_order(scenario: Scenario) -> None:
    loop = Loop(scenario)
    loop.run()
    for request in loop.requests:
        assert request.report is not None
        if request.adapter is None:
            assert request.chunks == []
            continue
        assert all(before.start < after.start for before, after in pairwise(request.chunks))
        reported = [
            ChunkDecision(request.id, chunk.start, chunk.rung, chunk.scale, chunk.crossfade)
            for i, chunk in enumerate(request.report.chunks)
            if not scenario.planned or i == 0 or _gate(chunk) != _gate(request.report.chunks[i - 1])
        ]
        if scenario.tabled:
            last = replace(request.chunks[-1], table=0)
            assert (request.chunks[-1].table, last.start) == (1, len(request.prompt) - 1)
            told = [*request.chunks[:-1], last]
            assert told[:-1] == [decision for decision in reported if decision.start < last.start]
            continue
        assert [decision for decision in request.chunks if decision.start < request.computed] == reported
        assert request.chunks[0].crossfade == 0
        for before, after in pairwise(request.chunks):
            changed = (before.rung, before.scale) != (after.rung, after.scale)
            window = min(scenario.policy.rank.crossfade, scenario.policy.chunker.min_length)
            assert after.crossfade == (window if changed else 0)


@given(scenarios())
@settings(deadline=None, max_examples=150)
def test_kv_decisions_are_chunks_by_complexity_that_never_overlap(scenario: Scenario) -> None:
    loop = Loop(replace(scenario, page_size=1))
    loop.run()
    rule = kv_rule(scenario.policy.kv)
    for request in loop.requests:
        assert request.report is not None
        assert all(before.end <= after.start for before, after in pairwise(request.kv))
        assert all(before.effective <= after.effective for before, after in pairwise(request.kv))
        reported = {chunk.end: chunk for chunk in request.report.chunks}
        took_effect = [decision for decision in request.kv if decision.effective < request.computed]
        for decision in took_effect:
            chunk = reported[decision.end]
            assert decision.start == max(chunk.start, scenario.policy.kv.sink_tokens)
            assert (chunk.kv, chunk.kv_dropped) == (decision.format, decision.drop_percent / 100)
            # The last token of the prompt is judged anew after a chunk that ends there was decided on.
            if decision.end != len(request.prompt):
                choice = rule.choose(chunk.complexity)
                assert (decision.format, decision.drop_percent) == (choice.format, choice.drop_percent)
        compressed = [chunk for chunk in request.report.chunks if chunk.kv is not KvFormat.FULL or chunk.kv_dropped]
        assert len(compressed) == len(took_effect)


@given(scenarios(), st.integers(1, 1000))
@settings(deadline=None, max_examples=150)
def test_what_is_decided_follows_from_the_request_alone(scenario: Scenario, cuts: int) -> None:
    """Whoever else is there, however its prompt is cut, unless memory was short."""
    scenario = replace(scenario, policy=replace(scenario.policy, kv=replace(scenario.policy.kv, when="always")))
    one, other = Loop(scenario), Loop(replace(scenario, cuts=cuts))
    one.run()
    other.run()
    for request, twin in zip(one.requests, other.requests, strict=True):
        assert (twin.chunks, twin.kv, twin.report) == (request.chunks, request.kv, request.report)


@given(scenarios(), st.sets(st.integers(1, 60), max_size=6), st.booleans())
@settings(deadline=None, max_examples=150)
def test_a_request_that_is_pre_empted_is_steered_as_if_it_were_not(
    scenario: Scenario, preempted: set[int], ahead: bool
) -> None:
    always = replace(scenario.policy, kv=replace(scenario.policy.kv, when="always"))
    scenario = replace(scenario, policy=always, results_before_signals=False, ahead=ahead)
    whole, interrupted = Loop(scenario), Loop(replace(scenario, preempted=tuple(preempted)))
    whole.run()
    interrupted.run()
    for request, twin in zip(whole.requests, interrupted.requests, strict=True):
        assert twin.report == request.report
        for decisions, repeated in ((request.chunks, twin.chunks), (request.kv, twin.kv)):
            fewer = min(len(decisions), len(repeated))
            assert repeated[:fewer] == decisions[:fewer]
            # What is decided for a request after its last token comes or does not.
            assert all(
                max(decision.start, getattr(decision, "effective", 0)) >= request.computed
                for decision in (*decisions[fewer:], *repeated[fewer:])
            )


@given(scenarios())
@settings(deadline=None, max_examples=150)
def test_steps_that_are_sent_ahead_are_steered_as_others(scenario: Scenario) -> None:
    """What is decided for a request after its last token, which is not known ahead, comes on top."""
    usual = Loop(replace(scenario, results_before_signals=False))
    ahead = Loop(replace(scenario, results_before_signals=False, ahead=True))
    usual.run()
    ahead.run()
    for request, twin in zip(usual.requests, ahead.requests, strict=True):
        assert twin.computed == request.computed
        assert twin.chunks[: len(request.chunks)] == request.chunks
        assert twin.kv[: len(request.kv)] == request.kv
        assert all(chunk.start >= request.computed for chunk in twin.chunks[len(request.chunks) :])


@given(scenarios())
@settings(deadline=None, max_examples=50)
def test_the_same_calls_lead_to_the_same_updates(scenario: Scenario) -> None:
    first, second = Loop(scenario), Loop(scenario)
    first.run()
    second.run()
    assert first.updates == second.updates
    assert [request.report for request in first.requests] == [request.report for request in second.requests]

"""Runs one scenario: fresh engines, alternating, each frozen while another runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from chunkwise.bench.engines import Garage, adapter_name
from chunkwise.bench.figures import merge
from chunkwise.bench.load import others_share
from chunkwise.bench.processes import EngineFailed, EngineProcess
from chunkwise.bench.prompts import make_prompt
from chunkwise.bench.runners.protocol import Json, RunResult, StreamOrder
from chunkwise.bench.scenarios import Case, Scenario, Stream
from chunkwise.tokenizer import Tokenizer

Say = Callable[[str], None]


@dataclass
class Measured:
    """One engine in one scenario: what it said at start, its results by setting, the share of the machine that others
    used meanwhile, and its processes' peak memory."""

    started: Json
    results: dict[str, list[RunResult]] = field(default_factory=dict)
    others: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


class Prompts:
    """Prompts by number and length, made once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._made: dict[tuple[int, int], tuple[str, list[int]]] = {}

    def order(self, stream: Stream) -> StreamOrder:
        """The stream with its prompt and its adapter's name."""
        key = (stream.prompt, stream.prompt_tokens)
        if key not in self._made:
            self._made[key] = make_prompt(self._tokenizer, stream.prompt_tokens, stream.prompt)
        text, ids = self._made[key]
        adapter = None if stream.adapter is None else adapter_name(stream.adapter)
        return StreamOrder(text, ids, adapter, stream.new_tokens, stream.start_ms)


def measure(
    scenario: Scenario, garage: Garage, prompts: Prompts, say: Say, before_round: Callable[[], None]
) -> dict[str, Measured]:
    """All engines of the scenario that can run, by name. One that fails is reported with its failure and the others go
    on. ``before_round`` is called while all are frozen."""
    measured: dict[str, Measured] = {}
    orders = {case: [prompts.order(stream) for stream in case.streams] for case in scenario.cases}
    with ExitStack() as stack:
        running: dict[str, EngineProcess] = {}
        for name in scenario.engines:
            if name not in garage.engines and name.split()[0] not in garage.engines:
                continue
            say(f"{scenario.name}: starting {name}")
            process = stack.enter_context(garage.open(name))
            try:
                measured[name] = Measured(process.start(garage.order(name, scenario)))
                running[name] = process
            except EngineFailed as error:
                measured[name] = Measured({}, failure=str(error))
        for round in range(scenario.discarded + scenario.rounds):
            before_round()
            for case in scenario.cases:
                for name in [name for name in case.engines if name in running]:
                    keep = round >= scenario.discarded and case.counts
                    before = running[name].load()
                    try:
                        result = _run(running[name], case, orders[case])
                    except EngineFailed as error:
                        measured[name].failure = str(error)
                        del running[name]
                        continue
                    others = others_share(before, running[name].load())
                    if keep:
                        measured[name].results.setdefault(case.setting, []).append(result)
                        measured[name].others.setdefault(case.setting, []).append(others)
                    say(f"{scenario.name}, round {round}: {name}, {case.setting}: {_brief(result, others)}")
        for name, process in running.items():
            measured[name].peak_bytes = process.peak_bytes()
    return measured


def _run(process: EngineProcess, case: Case, orders: list[StreamOrder]) -> RunResult:
    if case.one_by_one:
        return merge([process.run([order]) for order in orders])
    return process.run(orders)


def _brief(result: RunResult, others: float) -> str:
    seconds = max(stream.start_ms + stream.times_ms[-1] for stream in result.streams) / 1000
    tokens = sum(len(stream.ids) for stream in result.streams)
    return f"{tokens} tokens in {seconds:.2f} s, others had {others:.0%} of the machine"

"""What is measured: which streams each scenario asks for. Pure; knows engines by name and tokens by number alone."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from chunkwise.config.bench_flags import BenchSettings, InvalidBenchFlags, TraceSettings

PROMPT_TOKENS = 128
LONG_PROMPT_TOKENS = 1024
LONG_PROMPT_ANSWER = 8
ZIPF_ADAPTERS = 16
COLD_ADAPTERS, COLD_SLOTS = 16, 8
TRACE_ADAPTERS = 8

OURS = "chunkwise"
STEERED = "chunkwise steered"
BATCHING = (OURS, "vllm")
EVERYONE = (OURS, "peft", "llama", "vllm")


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer to ask for: ``prompt`` numbers the prompts of one length, ``adapter`` the adapters (None: the base)."""

    prompt: int
    prompt_tokens: int
    new_tokens: int
    adapter: int | None
    start_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """Streams that are asked for together (``one_by_one``: each after the last has ended) and reported as one setting.
    Those with ``counts`` off only warm the engines up."""

    setting: str
    streams: tuple[Stream, ...]
    engines: tuple[str, ...]
    one_by_one: bool = False
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Scenario:
    """Cases that fresh engines with ``adapters`` adapters run in order, ``rounds`` times after ``discarded`` rounds.
    ``flags`` go to our server, which takes those of the user over them."""

    name: str
    adapters: int
    cases: tuple[Case, ...]
    rounds: int
    discarded: int = 1
    flags: tuple[str, ...] = ()

    @property
    def engines(self) -> tuple[str, ...]:
        """All engines of its cases."""
        return tuple(dict.fromkeys(engine for case in self.cases for engine in case.engines))

    @property
    def streams(self) -> int:
        """Most streams at once."""
        return max(1 if case.one_by_one else len(case.streams) for case in self.cases)

    @property
    def tokens(self) -> int:
        """Longest stream, prompt and answer."""
        return max(s.prompt_tokens + s.new_tokens for case in self.cases for s in case.streams)


def zipf_adapters(count: int, adapters: int, exponent: float = 1.0, seed: int = 0) -> list[int]:
    """``count`` draws of an adapter, the k-th (from 0) with a probability in proportion to 1 / (k + 1)^exponent."""
    weights = [1 / (k + 1) ** exponent for k in range(adapters)]
    return random.Random(seed).choices(range(adapters), weights, k=count)


def replay(path: Path, settings: TraceSettings, adapters: int) -> tuple[Stream, ...]:
    """The trace's arrivals of its first ``seconds · speed`` seconds, stretched by 1 / ``speed``; adapters follow Zipf.

    Raises:
        InvalidBenchFlags: the file is not such a trace, or nothing arrives in that time.
    """
    rows: list[tuple[datetime, int, int]] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                # Fractions have seven digits, one more than fromisoformat takes.
                moment = datetime.fromisoformat(row["TIMESTAMP"][:26])
                if rows and (moment - rows[0][0]).total_seconds() > settings.seconds * settings.speed:
                    break
                rows.append((moment, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
    except (OSError, KeyError, ValueError) as error:
        raise InvalidBenchFlags(f"--trace {path} cannot be used: {error!r}") from error
    if not rows:
        raise InvalidBenchFlags(f"--trace {path} holds no arrival; raise --trace-seconds or --trace-speed")
    draws = zipf_adapters(len(rows), adapters)
    return tuple(
        Stream(
            prompt=index,
            prompt_tokens=min(max(prompt, 1), settings.max_prompt),
            new_tokens=min(max(answer, 1), settings.max_new),
            adapter=draws[index],
            start_ms=1000 * (moment - rows[0][0]).total_seconds() / settings.speed,
        )
        for index, (moment, prompt, answer) in enumerate(rows)
    )


def _batch(adapters: Sequence[int | None], new: int, prompt_tokens: int = PROMPT_TOKENS) -> tuple[Stream, ...]:
    return tuple(Stream(index, prompt_tokens, new, adapter) for index, adapter in enumerate(adapters))


def _single(s: BenchSettings) -> Scenario:
    cases = (
        Case("base", _batch([None], s.new_tokens), EVERYONE),
        Case("1 adapter", _batch([0], s.new_tokens), EVERYONE),
    )
    return Scenario("single", 1, cases, s.rounds)


def _mixed8(s: BenchSettings) -> Scenario:
    return Scenario("mixed8", 8, (Case("8 adapters", _batch(range(8), s.new_tokens), EVERYONE),), s.rounds)


def _zipf32(s: BenchSettings) -> Scenario:
    draws = zipf_adapters(32, ZIPF_ADAPTERS)
    case = Case(f"{len(set(draws))} of {ZIPF_ADAPTERS} adapters, Zipf", _batch(draws, s.new_tokens), EVERYONE)
    return Scenario("zipf32", ZIPF_ADAPTERS, (case,), s.rounds)


def _prefill1k(s: BenchSettings) -> Scenario:
    case = Case("1 adapter", _batch([0], LONG_PROMPT_ANSWER, LONG_PROMPT_TOKENS), EVERYONE)
    return Scenario("prefill1k", 1, (case,), s.rounds)


def _tax8(s: BenchSettings) -> Scenario:
    cases = (
        Case("base", _batch([None] * 8, s.new_tokens), (OURS,)),
        Case("1 adapter for all", _batch([0] * 8, s.new_tokens), (OURS,)),
    )
    return Scenario("tax8", 1, cases, s.rounds)


def _rank8(s: BenchSettings) -> Scenario:
    case = Case("8 adapters", _batch(range(8), s.new_tokens), (OURS, STEERED))
    return Scenario("rank8", 8, (case,), s.rounds)


def _trace(s: BenchSettings) -> Scenario:
    assert s.trace.file is not None, "bench_settings leaves the scenario out when there is no file"
    streams = replay(s.trace.file, s.trace, TRACE_ADAPTERS)
    warm = Case("warm-up", _batch(range(2), 8), BATCHING, counts=False)
    return Scenario("trace", TRACE_ADAPTERS, (warm, Case("replayed", streams, BATCHING)), 1, discarded=0)


def _cold(s: BenchSettings) -> Scenario:
    """Every adapter twice in a row, those last that are in memory at start: the first use always finds it evicted, the
    second in memory. Everything else is warm."""
    warm = Case("warm-up", _batch([None] * 3, 8), (OURS,), one_by_one=True, counts=False)
    order = (*range(COLD_SLOTS, COLD_ADAPTERS), *range(COLD_SLOTS))
    uses = tuple(Case(use, (stream,), (OURS,)) for stream in _batch(order, 2) for use in ("first use", "again"))
    return Scenario("cold", COLD_ADAPTERS, (warm, *uses), 1, 0, (f"--max-active-adapters={COLD_SLOTS}",))


SCENARIO_OF: dict[str, Callable[[BenchSettings], Scenario]] = {
    "single": _single,
    "mixed8": _mixed8,
    "zipf32": _zipf32,
    "prefill1k": _prefill1k,
    "tax8": _tax8,
    "rank8": _rank8,
    "trace": _trace,
    "cold": _cold,
}

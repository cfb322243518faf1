"""The steering policy: every number that estimator, chunker, rank selector and KV policy take, and its TOML form."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from chunkwise.config.adapter_policy import AdapterPolicy, parse_adapters
from chunkwise.config.invalid_policy import InvalidPolicy as InvalidPolicy
from chunkwise.config.invalid_policy import require as _require


def _require_positive(name: str, value: float) -> None:
    _require(0.0 < value < math.inf, f"{name} is {value}; it must be finite and greater than 0")


def _require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, f"{name} is {value!r}; use one of {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class SignalPolicy:
    """One signal of the estimator: ``weight`` 0 switches it off; ``mean`` and ``std`` are the running normalisation's
    starting point, in the signal's own unit."""

    weight: float
    mean: float
    std: float

    def __post_init__(self) -> None:
        _require(math.isfinite(self.weight), f"signal weight is {self.weight}; it must be finite")
        _require(math.isfinite(self.mean), f"signal mean is {self.mean}; it must be finite")
        _require_positive("signal std", self.std)


@dataclass(frozen=True, slots=True)
class EstimatorPolicy:
    """Weights of the four signals and how complexity is formed from them.

    ``inertia`` is the number of tokens that the starting mean and std count for; a normalised signal is cut to
    ± ``clip`` standard deviations; ``gain`` steepens the squashing; ``ngram`` is the longest n-gram of the novelty
    signal; ``decay_tokens`` and ``floor`` shape the positional prior.
    """

    entropy: SignalPolicy = field(default_factory=lambda: SignalPolicy(weight=1.0, mean=0.15, std=0.12))
    novelty: SignalPolicy = field(default_factory=lambda: SignalPolicy(weight=0.5, mean=0.75, std=0.25))
    attention: SignalPolicy = field(default_factory=lambda: SignalPolicy(weight=0.25, mean=0.5, std=0.2))
    position: SignalPolicy = field(default_factory=lambda: SignalPolicy(weight=0.5, mean=0.3, std=0.25))
    inertia: float = 32.0
    clip: float = 3.0
    gain: float = 1.5
    ngram: int = 4
    decay_tokens: float = 32.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        _require_positive("estimator.inertia", self.inertia)
        _require_positive("estimator.clip", self.clip)
        _require_positive("estimator.gain", self.gain)
        _require(self.ngram >= 1, f"estimator.ngram is {self.ngram}; it must be at least 1")
        _require_positive("estimator.decay_tokens", self.decay_tokens)
        _require(0.0 <= self.floor <= 1.0, f"estimator.floor is {self.floor}; it must lie in [0, 1]")


@dataclass(frozen=True, slots=True)
class ChunkerPolicy:
    """When a chunk closes: at ``max_length`` tokens, or from ``min_length`` on when the recent complexity has moved by
    more than ``threshold`` from the chunk's mean. Recent complexity is an exponential mean that gives the newest token
    the weight 1 / ``smoothing_tokens`` (1: the newest token alone)."""

    min_length: int = 16
    max_length: int = 64
    threshold: float = 0.1
    smoothing_tokens: float = 8.0

    def __post_init__(self) -> None:
        _require(
            1 <= self.min_length <= self.max_length,
            f"chunker lengths are {self.min_length}..{self.max_length}; need 1 <= min_length <= max_length",
        )
        _require_positive("chunker.threshold", self.threshold)
        _require(
            1.0 <= self.smoothing_tokens < math.inf,
            f"chunker.smoothing_tokens is {self.smoothing_tokens}; it must be finite and at least 1",
        )


@dataclass(frozen=True, slots=True)
class RankPolicy:
    """The ranks of adapters that have no section of their own, by one of two sources.

    "roles": a prompt runs at the smallest rung of at least ``prompt_rung``, the answer, from the prompt's last token
    on, at that of ``answer_rung`` (None: the trained rank). By default both are the trained rank, which is plain LoRA:
    how much rank a real adapter needs could be told neither from its ladder nor from the text, but only by measuring,
    which is what ``chunkwise calibrate`` does.

    "complexity": the wanted rank runs geometrically from ``min_rank`` at complexity 0 to ``max_rank`` (None: the
    trained rank) at 1 and is rounded up to a rung; below the complexity ``skip_below`` the adapter is skipped (rung 0).
    At equal mean rank this was no better than a fixed rank; it is kept to be compared with.

    ``energy_exponent`` makes up for dropped energy in the scale (0: scale 1); ``crossfade`` is the window in tokens,
    cut to ``chunker.min_length`` so that it ends within its chunk: 4 tokens were no better than none.
    """

    source: Literal["roles", "complexity"] = "roles"
    prompt_rung: float | None = None
    answer_rung: float | None = None
    min_rank: int = 2
    max_rank: int | None = None
    skip_below: float = 0.0
    energy_exponent: float = 0.0
    crossfade: int = 0

    def __post_init__(self) -> None:
        _require(self.source in ("roles", "complexity"), f"rank.source is {self.source!r}; use 'roles' or 'complexity'")
        for name, rung in (("prompt_rung", self.prompt_rung), ("answer_rung", self.answer_rung)):
            _require(rung is None or 0.0 <= rung < math.inf, f"rank.{name} is {rung}; it must be finite, at least 0")
        _require(self.min_rank >= 1, f"rank.min_rank is {self.min_rank}; it must be at least 1")
        _require(
            self.max_rank is None or self.max_rank >= self.min_rank,
            f"rank.max_rank is {self.max_rank}; it must be at least min_rank, {self.min_rank}",
        )
        _require(0.0 <= self.skip_below <= 1.0, f"rank.skip_below is {self.skip_below}; it must lie in [0, 1]")
        _require(0.0 <= self.energy_exponent <= 1.0, f"rank.energy_exponent is {self.energy_exponent}; use [0, 1]")
        _require(self.crossfade >= 0, f"rank.crossfade is {self.crossfade}; it must be at least 0")


KvKind = Literal["full", "int8", "int4", "keep", "window", "complexity"]
KvFormatName = Literal["full", "int8", "int4"]
_KV_FORMATS = ("full", "int8", "int4")


@dataclass(frozen=True, slots=True)
class KvPolicy:
    """What becomes of the keys and values of closed chunks.

    ``kind`` "full" leaves them as they are; "int8" and "int4" store all in that format; "keep" keeps ``keep_percent``
    of each chunk's tokens, those that ``scorer`` ranks highest, in ``kept_format``; "window" gives up what lies further
    back than ``window_tokens``; "complexity" goes by the chunk: of complexity ``hard_above`` or more it stays full,
    below ``easy_below`` it takes ``easy_format`` and loses ``easy_drop_percent`` of its tokens (those that ``scorer``
    ranks lowest), in between it takes ``middle_format``.

    ``when`` "pressure" does so for requests that meet a cache running short of memory, "always" for all. The first
    ``sink_tokens`` positions are never touched, nor is a chunk before ``recent_tokens`` positions lie behind its end;
    while the prompt is read, it is looked at every ``block_tokens`` positions.
    """

    kind: KvKind = "complexity"
    when: Literal["pressure", "always"] = "pressure"
    easy_below: float = 0.4
    easy_format: KvFormatName = "int4"
    easy_drop_percent: int = 0
    middle_format: KvFormatName = "int8"
    hard_above: float = 0.6
    keep_percent: int = 50
    kept_format: KvFormatName = "full"
    scorer: Literal["key_norm", "key_diversity"] = "key_norm"
    window_tokens: int = 1024
    sink_tokens: int = 16
    recent_tokens: int = 64
    block_tokens: int = 512

    def __post_init__(self) -> None:
        _require_one_of("kv.kind", self.kind, ("full", "int8", "int4", "keep", "window", "complexity"))
        _require_one_of("kv.when", self.when, ("pressure", "always"))
        _require_one_of("kv.scorer", self.scorer, ("key_norm", "key_diversity"))
        for name in ("easy_format", "middle_format", "kept_format"):
            _require_one_of(f"kv.{name}", getattr(self, name), _KV_FORMATS)
        _require(
            0.0 <= self.easy_below <= self.hard_above <= 1.0,
            f"kv.easy_below is {self.easy_below} and kv.hard_above {self.hard_above}; "
            "need 0 <= easy_below <= hard_above <= 1",
        )
        for name in ("easy_drop_percent", "keep_percent"):
            _require(0 <= getattr(self, name) <= 100, f"kv.{name} is {getattr(self, name)}; it must lie in 0..100")
        for name in ("window_tokens", "sink_tokens", "recent_tokens"):
            _require(getattr(self, name) >= 0, f"kv.{name} is {getattr(self, name)}; it must be at least 0")
        _require(self.block_tokens >= 1, f"kv.block_tokens is {self.block_tokens}; it must be at least 1")

    @property
    def protected_tokens(self) -> int:
        """Positions that lie behind a chunk's end before the chunk is touched."""
        return max(self.window_tokens, self.recent_tokens) if self.kind == "window" else self.recent_tokens


@dataclass(frozen=True, slots=True)
class SteeringPolicy:
    """The parts of one steering policy; the defaults are what ``chunkwise serve`` runs without ``--policy``.
    ``adapters`` holds, by the name that an adapter is served under, what was calibrated for it alone."""

    estimator: EstimatorPolicy = field(default_factory=EstimatorPolicy)
    chunker: ChunkerPolicy = field(default_factory=ChunkerPolicy)
    rank: RankPolicy = field(default_factory=RankPolicy)
    kv: KvPolicy = field(default_factory=KvPolicy)
    adapters: Mapping[str, AdapterPolicy] = field(default_factory=dict)


_NUMBERS = {"int": (int,), "float": (int, float), "int | None": (int,), "float | None": (int, float)}


def _value(where: str, annotation: str, value: Any) -> Any:
    accepted = _NUMBERS.get(annotation, (str,))
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise InvalidPolicy(f"{where} is {value!r}; a value of type {annotation} is expected")
    return float(value) if annotation == "float" else value


def _merge(where: str, default: Any, table: Any) -> Any:
    """``default`` with the keys of ``table`` put in, and so for the dataclasses inside it."""
    if not isinstance(table, dict):
        raise InvalidPolicy(f"{where} is {table!r}; a table is expected")
    annotations = {f.name: str(f.type) for f in fields(default)}
    unknown = sorted(set(table) - set(annotations))
    if unknown:
        raise InvalidPolicy(f"{where} has unknown keys {unknown}; known are {sorted(annotations)}")
    changes: dict[str, Any] = {}
    for key, value in table.items():
        current = getattr(default, key)
        inner = f"{where}.{key}"
        nested = is_dataclass(current)
        changes[key] = _merge(inner, current, value) if nested else _value(inner, annotations[key], value)
    return replace(default, **changes)


def parse_policy(text: str) -> SteeringPolicy:
    """The policy in a TOML text; sections and keys left out, a signal's too, keep their defaults.

    Raises:
        InvalidPolicy: not TOML, an unknown section or key, a wrong type, or a value out of range.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidPolicy(f"policy is not valid TOML: {error}") from error
    adapters = parse_adapters(document.pop("adapters", {}))
    policy: SteeringPolicy = _merge("policy", SteeringPolicy(adapters=adapters), document)
    return policy


def load_policy(path: Path) -> SteeringPolicy:
    """`parse_policy` of a file. Raises InvalidPolicy, also when the file cannot be read as UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidPolicy(f"policy file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidPolicy(f"policy file {path} is not UTF-8 text: {error}") from error
    return parse_policy(text)

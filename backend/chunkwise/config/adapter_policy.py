"""The section that ``chunkwise calibrate`` writes for one adapter: which weights it was measured on, and the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from chunkwise.config.invalid_policy import InvalidPolicy, require
from chunkwise.core import rank_budget

# What a token id takes at most, as on the wire.
_MOST_ID = 2**32 - 1


@dataclass(frozen=True, slots=True)
class PriceTable:
    """The expected loss in nats, against full rank, of a prompt token at each rung: ``tokens`` by token id, ``default``
    for every other id."""

    default: tuple[float, ...]
    tokens: Mapping[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        for name, row in [("default", self.default), *self.tokens.items()]:
            require(
                len(row) == len(self.default) and all(map(math.isfinite, row)),
                f"prices of {name} are {row}; {len(self.default)} finite numbers are expected, one per rung",
            )


@dataclass(frozen=True, slots=True)
class AdapterPolicy:
    """Ranks for one adapter, valid for the weights of ``content_hash`` with the ladder of ``rungs`` and ``kept_energy``
    alone.

    A prompt runs at ``prompt_rung``, or, with ``prices``, in chunks that each take the rung of least cost: the sum of
    their tokens' prices, plus ``price_per_rank`` (nats) times the rung's mean active rank for every token; they have at
    least ``min_length`` tokens (None: as the ``[chunker]`` section says). The answer, from the prompt's last token on,
    which produces its first one, runs at ``answer_rung``, but for tokens of the ids in
    ``answer_tokens``, which run at rungs of their own. ``scales``, one per rung, multiply the adapter's output (None:
    the ``[rank]`` section says).
    """

    content_hash: str
    rungs: tuple[float, ...]
    kept_energy: tuple[float, ...]
    answer_rung: float
    prompt_rung: float | None = None
    price_per_rank: float = 0.0
    min_length: int | None = None
    scales: tuple[float, ...] | None = None
    prices: PriceTable | None = None
    answer_tokens: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.rungs)
        require(
            count > 0 and list(self.rungs) == sorted(set(self.rungs)),
            f"rungs are {self.rungs}; they must ascend, and there must be at least one",
        )
        for name, row in (
            ("kept_energy", self.kept_energy),
            ("scales", self.scales),
            ("prices", self.prices.default if self.prices is not None else None),
        ):
            require(row is None or len(row) == count, f"{name} has {len(row or ())} numbers for {count} rungs")
        for name, rung in (("answer_rung", self.answer_rung), ("prompt_rung", self.prompt_rung)):
            require(rung is None or rung in self.rungs, f"{name} is {rung}; it must be one of {self.rungs}")
        strange = sorted(set(self.answer_tokens.values()) - set(self.rungs))
        require(not strange, f"answer_tokens have the rungs {strange}; each must be one of {self.rungs}")
        require(
            self.scales is None or not self.answer_tokens or len(set(self.scales)) == 1,
            "answer_tokens change the rung of a token, not its scale; give one scale for all rungs, or none",
        )
        require(
            (self.prompt_rung is None) != (self.prices is None),
            "give either prompt_rung or prices; they are two ways to choose the rank of a prompt",
        )
        require(
            0.0 <= self.price_per_rank < math.inf,
            f"price_per_rank is {self.price_per_rank}; it must be finite and at least 0",
        )
        require(
            self.min_length is None or self.min_length >= 1, f"min_length is {self.min_length}; it must be at least 1"
        )
        require(
            all(math.isfinite(scale) for scale in self.scales or ()), f"scales are {self.scales}; they must be finite"
        )


def parse_adapters(tables: Any) -> dict[str, AdapterPolicy]:
    """The sections ``[adapters."NAME"]`` of a policy file. Raises InvalidPolicy, which says where."""
    if not isinstance(tables, dict):
        raise InvalidPolicy(f"policy.adapters is {tables!r}; a table is expected")
    policies: dict[str, AdapterPolicy] = {}
    for name, table in tables.items():
        where = f'policy.adapters."{name}"'
        try:
            policies[name] = _adapter(_table(table, [f.name for f in fields(AdapterPolicy)], _REQUIRED))
        except InvalidPolicy as error:
            raise InvalidPolicy(f"{where}: {error}; make it anew with chunkwise calibrate, or mend it") from None
    return policies


_REQUIRED = ("content_hash", "rungs", "kept_energy", "answer_rung")


def _adapter(table: Mapping[str, Any]) -> AdapterPolicy:
    prices = table.get("prices")
    scales = table.get("scales")
    prompt_rung = table.get("prompt_rung")
    if not isinstance(table["content_hash"], str):
        raise InvalidPolicy(f"content_hash is {table['content_hash']!r}; a text is expected")
    min_length = table.get("min_length")
    if min_length is not None and type(min_length) is not int:
        raise InvalidPolicy(f"min_length is {min_length!r}; a whole number is expected")
    return AdapterPolicy(
        content_hash=table["content_hash"],
        rungs=tuple(map(rank_budget, _row("rungs", table["rungs"]))),
        kept_energy=_row("kept_energy", table["kept_energy"]),
        answer_rung=rank_budget(_number("answer_rung", table["answer_rung"])),
        prompt_rung=None if prompt_rung is None else rank_budget(_number("prompt_rung", prompt_rung)),
        price_per_rank=_number("price_per_rank", table.get("price_per_rank", 0.0)),
        min_length=min_length,
        scales=None if scales is None else _row("scales", scales),
        answer_tokens=_answer_tokens(table.get("answer_tokens", [])),
        prices=None if prices is None else _prices(_table(prices, ("default", "tokens"), ("default",))),
    )


def _answer_tokens(listed: Any) -> dict[int, float]:
    return {token_id: rank_budget(row[0]) for token_id, row in _rows("answer_tokens", listed, 1).items()}


def _prices(table: Mapping[str, Any]) -> PriceTable:
    default = _row("prices.default", table["default"])
    return PriceTable(default, _rows("prices.tokens", table.get("tokens", []), len(default)))


def _rows(name: str, listed: Any, numbers: int) -> dict[int, tuple[float, ...]]:
    """Rows of a token id and so many numbers, by token id."""
    if not isinstance(listed, list):
        raise InvalidPolicy(f"{name} is {listed!r}; a list of rows is expected")
    rows: dict[int, tuple[float, ...]] = {}
    for row in listed:
        fits = isinstance(row, list) and len(row) == 1 + numbers and type(row[0]) is int
        if not fits or not 0 <= row[0] <= _MOST_ID:
            raise InvalidPolicy(f"{name} has the row {row!r}; a token id and {numbers} numbers are expected")
        if row[0] in rows:
            raise InvalidPolicy(f"{name} has two rows for token {row[0]}")
        rows[row[0]] = _row(name, row[1:])
    return rows


def _table(table: Any, known: Iterable[str], required: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(table, dict):
        raise InvalidPolicy(f"{table!r} is no table")
    if unknown := sorted(set(table) - set(known)):
        raise InvalidPolicy(f"unknown keys {unknown}; known are {sorted(known)}")
    if missing := sorted(set(required) - set(table)):
        raise InvalidPolicy(f"{missing} are missing")
    return table


def _row(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise InvalidPolicy(f"{name} is {values!r}; a list of numbers is expected")
    return tuple(_number(name, value) for value in values)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidPolicy(f"{name} holds {value!r}; a number is expected")
    return float(value)

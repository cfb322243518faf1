"""Ranks that are fixed before a token is computed: one for the prompt or one for each of its chunks, and one for the
answer. Knows nothing of signals."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from chunkwise.config.adapter_policy import AdapterPolicy, PriceTable
from chunkwise.config.policy import InvalidPolicy, SteeringPolicy
from chunkwise.core import AdapterInfo
from chunkwise.steering.cuts import cheapest_chunks
from chunkwise.steering.ranks import RankChoice, rank_choices

# The squared singular values of one adapter differ between machines in their last digits.
_ENERGY_TOLERANCE = 1e-4


class PlannedChunk(NamedTuple):
    """From the position ``start`` on, until the next one starts."""

    start: int
    choice: RankChoice


class RankPlan(Protocol):
    """Chooses the ranks of a sequence from its prompt alone, but for answer tokens that have one of their own."""

    @property
    def answer_tokens(self) -> Mapping[int, RankChoice]:
        """By token id, the choices of tokens in the answer's chunk that do not take the answer's."""
        ...

    def chunks(self, prompt_ids: Sequence[int]) -> list[PlannedChunk]:
        """The whole sequence, from position 0 on, neighbours of different choices unless there are `answer_tokens`. The
        last one holds the answer and, with it, the prompt's last token: that is the one which produces the answer's
        first token."""
        ...


@dataclass(frozen=True, slots=True)
class RolePlan:
    """One choice for the prompt and one for the answer."""

    prompt: RankChoice
    answer: RankChoice
    answer_tokens: Mapping[int, RankChoice] = field(default_factory=dict)

    def chunks(self, prompt_ids: Sequence[int]) -> list[PlannedChunk]:
        """See `RankPlan`."""
        return _with_answer([PlannedChunk(0, self.prompt)], self, len(prompt_ids))


class PricePlan:
    """Prompt chunks of at least ``min_length`` tokens at the rungs of least cost, as `AdapterPolicy` says, cut where
    that cost is least; one choice for the answer."""

    def __init__(
        self,
        choices: Sequence[RankChoice],
        answer: RankChoice,
        prices: PriceTable,
        price_per_rank: float,
        min_length: int,
        answer_tokens: Mapping[int, RankChoice] | None = None,
    ) -> None:
        self.answer_tokens = answer_tokens or {}
        self.answer = answer
        self._choices = tuple(choices)
        self._min_length = min_length
        self._rows = {token_id: row for row, token_id in enumerate(prices.tokens, start=1)}
        rank_costs = price_per_rank * np.array([choice.active_rank for choice in choices])
        self._costs = np.array([prices.default, *prices.tokens.values()]) + rank_costs

    def chunks(self, prompt_ids: Sequence[int]) -> list[PlannedChunk]:
        """See `RankPlan`."""
        rows = [self._rows.get(token_id, 0) for token_id in prompt_ids[:-1]]
        cut = cheapest_chunks(self._costs[rows], self._min_length) if rows else []
        planned = [PlannedChunk(start, self._choices[level]) for start, level in cut]
        return _with_answer(planned, self, len(prompt_ids))


def make_plan(policy: SteeringPolicy, adapter: AdapterInfo) -> RankPlan | None:
    """How the ranks of an adapter's sequences are planned; None: they follow complexity instead.

    Raises:
        InvalidPolicy: the adapter's section was made for other weights or another ladder.
        ValueError: the adapter's rungs are malformed.
    """
    section = policy.adapters.get(adapter.adapter_id)
    if section is not None:
        return _calibrated(policy, section, adapter)
    if policy.rank.source == "complexity":
        return None
    choices = rank_choices(adapter, policy.rank.energy_exponent)
    prompt, answer = (_at_least(choices, rung) for rung in (policy.rank.prompt_rung, policy.rank.answer_rung))
    return RolePlan(prompt, answer)


def check_sections(policy: SteeringPolicy, adapters: Iterable[AdapterInfo]) -> list[str]:
    """Checks the sections of all resident adapters; returns the names of sections that none of them has.

    Raises:
        InvalidPolicy: as `make_plan`.
    """
    resident = {adapter.adapter_id: adapter for adapter in adapters}
    for name in resident.keys() & policy.adapters.keys():
        make_plan(policy, resident[name])
    return sorted(policy.adapters.keys() - resident.keys())


def _calibrated(policy: SteeringPolicy, section: AdapterPolicy, adapter: AdapterInfo) -> RankPlan:
    _check_origin(section, adapter)
    by_rung = dict(zip(adapter.rungs, rank_choices(adapter, policy.rank.energy_exponent, section.scales), strict=True))
    answer = by_rung[section.answer_rung]
    tokens = {token_id: by_rung[rung] for token_id, rung in section.answer_tokens.items()}
    if section.prices is None:
        assert section.prompt_rung is not None, "a section without prices has a prompt_rung"
        return RolePlan(by_rung[section.prompt_rung], answer, tokens)
    min_length = section.min_length or policy.chunker.min_length
    return PricePlan(list(by_rung.values()), answer, section.prices, section.price_per_rank, min_length, tokens)


def _check_origin(section: AdapterPolicy, adapter: AdapterInfo) -> None:
    name, remedy = adapter.adapter_id, "run chunkwise calibrate on the adapter as it is served"
    if section.content_hash != adapter.content_hash:
        raise InvalidPolicy(
            f'policy section adapters."{name}" was made for weights {section.content_hash[:12]!r}, but the adapter '
            f"served under this name has {adapter.content_hash[:12]!r}; {remedy}"
        )
    same_energy = len(section.kept_energy) == len(adapter.kept_energy) and all(
        math.isclose(a, b, abs_tol=_ENERGY_TOLERANCE)
        for a, b in zip(section.kept_energy, adapter.kept_energy, strict=True)
    )
    if section.rungs != adapter.rungs or not same_energy:
        raise InvalidPolicy(
            f'policy section adapters."{name}" was made for a ladder of rungs {section.rungs} that keep '
            f"{_rounded(section.kept_energy)}; the one served has {adapter.rungs} and {_rounded(adapter.kept_energy)}; "
            f"{remedy}"
        )


def _rounded(energies: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(energy, 4) for energy in energies)


def _at_least(choices: Sequence[RankChoice], rung: float | None) -> RankChoice:
    """The smallest rung of at least ``rung``, or the largest there is."""
    if rung is None:
        return choices[-1]
    index = bisect_left(choices, rung, key=lambda choice: choice.rung or 0.0)
    return choices[min(index, len(choices) - 1)]


def _with_answer(planned: list[PlannedChunk], plan: RolePlan | PricePlan, prompt_length: int) -> list[PlannedChunk]:
    """The prompt's chunks up to its last token, then the answer's."""
    prompt = [chunk for chunk in planned if chunk.start < prompt_length - 1]
    if prompt and prompt[-1].choice == plan.answer and not plan.answer_tokens:
        return prompt
    return [*prompt, PlannedChunk(prompt_length - 1, plan.answer)]

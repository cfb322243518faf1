"""What becomes of the keys and values of a closed chunk. Knows its complexity; knows no positions and no pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from chunkwise.config.policy import KvPolicy
from chunkwise.core import KvFormat, KvScorer


@dataclass(frozen=True, slots=True)
class KvChoice:
    """What a chunk's whole pages become; the fields are those of `core.KvDecision`."""

    format: KvFormat = KvFormat.FULL
    drop_percent: int = 0
    scorer: KvScorer = KvScorer.KEY_NORM

    @property
    def changes(self) -> bool:
        """Whether anything happens to the chunk."""
        return self.format is not KvFormat.FULL or self.drop_percent > 0


def milder(one: KvChoice, other: KvChoice) -> KvChoice:
    """What loses no more than either."""
    return KvChoice(min(one.format, other.format), min(one.drop_percent, other.drop_percent), other.scorer)


class KvRule(Protocol):
    """One kind of KV policy."""

    def choose(self, complexity: float) -> KvChoice:
        """What becomes of a chunk of this mean complexity, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Alike:
    """Every chunk becomes the same: kinds "full", "int8", "int4", "keep" and, with nothing kept, "window"."""

    choice: KvChoice

    def choose(self, complexity: float) -> KvChoice:
        """See `KvRule`."""
        return self.choice


@dataclass(frozen=True, slots=True)
class ByComplexity:
    """Kind "complexity": chunks below ``easy_below`` become ``easy``, others below ``hard_above`` become ``middle``,
    and the rest stays full."""

    easy_below: float
    easy: KvChoice
    hard_above: float
    middle: KvChoice

    def choose(self, complexity: float) -> KvChoice:
        """See `KvRule`."""
        if complexity < self.easy_below:
            return self.easy
        return self.middle if complexity < self.hard_above else KvChoice()


def kv_rule(policy: KvPolicy) -> KvRule:
    """The rule that ``policy`` names."""
    scorer = KvScorer[policy.scorer.upper()]
    if policy.kind == "complexity":
        return ByComplexity(
            policy.easy_below,
            KvChoice(KvFormat[policy.easy_format.upper()], policy.easy_drop_percent, scorer),
            policy.hard_above,
            KvChoice(KvFormat[policy.middle_format.upper()]),
        )
    if policy.kind == "keep":
        return Alike(KvChoice(KvFormat[policy.kept_format.upper()], 100 - policy.keep_percent, scorer))
    if policy.kind == "window":
        return Alike(KvChoice(drop_percent=100))
    return Alike(KvChoice(KvFormat[policy.kind.upper()]))

"""Which KV decisions of a sequence wait, and which of its pages each rewrites when it takes effect. Integers only.

Positions count all tokens there were, slots those that are kept. A page that holds what is left of a run of positions
counts as that whole run from then on; the pages behind it are untouched, and only their slots move.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace

from chunkwise.core import KvDecision, KvFormat, KvScorer, SteeringViolation

_Ask = tuple[KvFormat, int, KvScorer]


def kept_pages(pages: int, drop_percent: int) -> int:
    """How many of ``pages`` pages are left, rounded up."""
    return -(-pages * (100 - drop_percent) // 100)


def _ask(decision: KvDecision) -> _Ask:
    return decision.format, decision.drop_percent, decision.scorer


@dataclass(frozen=True, slots=True)
class Grant:
    """What one decision does to a table of pages.

    ``whole`` are the places of the pages whose positions all lie in its range, joined to adjacent ranges that asked for
    the same before, unless they lie in those alone: they become what it asks for. ``shared`` are pages that it has in
    common with other ranges, or with none: they become the largest format that their positions were granted.
    """

    whole: slice
    shared: dict[int, KvFormat]


class Retention:
    """The KV decisions of one sequence with pages of ``page_size`` tokens.

    Attributes:
        dropped: tokens given up so far, a multiple of the page size.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._accepted: list[KvDecision] = []
        self._waiting: list[tuple[int, int, KvDecision]] = []
        self._granted: list[tuple[int, int, _Ask]] = []
        self._runs: list[tuple[int, int]] = []

    def accept(self, decision: KvDecision, computed: int) -> None:
        """Takes a decision over, ``computed`` positions being computed; one that asks for nothing is forgotten.

        Raises:
            SteeringViolation: it takes effect in the past or before its range is computed, or asks for no more than an
                earlier one over the same positions.
        """
        if decision.format is KvFormat.FULL and decision.drop_percent == 0:
            return
        effective = decision.effective or computed
        self._check(decision, effective, computed)
        self._accepted.append(decision)
        insort(self._waiting, (effective, len(self._accepted), decision), key=lambda waiting: waiting[:2])

    def _check(self, decision: KvDecision, effective: int, computed: int) -> None:
        name = f"KV decision of request {decision.request_id} over [{decision.start}, {decision.end})"
        if effective < computed:
            raise SteeringViolation(
                f"{name} takes effect at position {effective}, but {computed} positions are computed already; it must "
                "name a later position"
            )
        if not 0 <= decision.start < decision.end <= effective:
            raise SteeringViolation(
                f"{name} takes effect at position {effective}; its range must not be empty and end there or before"
            )
        if not 0 <= decision.drop_percent <= 100:
            raise SteeringViolation(f"{name} drops {decision.drop_percent} %; it must be 0 to 100")
        for earlier in self._accepted:
            apart = decision.end <= earlier.start or earlier.end <= decision.start
            if not apart and decision.format <= earlier.format and decision.drop_percent <= earlier.drop_percent:
                raise SteeringViolation(
                    f"{name} asks for {decision.format.name} and {decision.drop_percent} % dropped where an earlier "
                    f"one over [{earlier.start}, {earlier.end}) asked for {earlier.format.name} and "
                    f"{earlier.drop_percent} %; ranges must do without overlap or ask for more"
                )

    def next_effective(self, computed: int) -> int | None:
        """The first position beyond ``computed`` at which a decision takes effect."""
        return next((effective for effective, _, _ in self._waiting if effective > computed), None)

    def take_due(self, computed: int) -> list[KvDecision]:
        """Decisions that take effect now that ``computed`` positions are computed, in the order in which they came; of
        neighbours that ask for the same, one is made."""
        due: list[KvDecision] = []
        while self._waiting and self._waiting[0][0] <= computed:
            decision = self._waiting.pop(0)[2]
            if due and due[-1].end == decision.start and _ask(due[-1]) == _ask(decision):
                decision = replace(decision, start=due.pop().start)
            due.append(decision)
        return due

    def grant(self, decision: KvDecision, pages: int, page_size: int) -> Grant:
        """What a due decision does to a table of ``pages`` pages."""
        ask = _ask(decision)
        start, end = decision.start, decision.end
        for other in [granted for granted in self._granted if granted[2] == ask]:
            if other[1] == start or other[0] == end:
                start, end = min(start, other[0]), max(end, other[1])
                self._granted.remove(other)
        self._granted.append((start, end, ask))
        runs = [self._run(place, page_size) for place in range(pages)]
        touched = [place for place, run in enumerate(runs) if run[0] < decision.end and decision.start < run[1]]
        whole = [place for place in touched if start <= runs[place][0] and runs[place][1] <= end]
        shared = {place: self._granted_format(runs[place]) for place in touched if place not in whole}
        return Grant(slice(whole[0], whole[-1] + 1) if whole else slice(0, 0), shared)

    def _granted_format(self, run: tuple[int, int]) -> KvFormat:
        """The smallest format that all positions of a run may be stored in."""
        over = [granted for granted in self._granted if granted[0] < run[1] and run[0] < granted[1]]
        cuts = {run[0], *(cut for start, end, _ in over for cut in (start, end) if run[0] < cut < run[1])}
        return min(
            max((ask[0] for start, end, ask in over if start <= cut < end), default=KvFormat.FULL) for cut in cuts
        )

    def drop(self, places: slice, kept: int, page_size: int) -> None:
        """Notes that the pages at ``places`` were packed into ``kept`` pages."""
        for place in range(len(self._runs), places.stop):
            self._runs.append(self._run(place, page_size))
        whole = (self._runs[places.start][0], self._runs[places.stop - 1][1])
        self._runs[places] = [whole] * kept
        self.dropped += (places.stop - places.start - kept) * page_size

    def _run(self, place: int, page_size: int) -> tuple[int, int]:
        """The positions that a page stands for: the first, and the one after the last."""
        if place < len(self._runs):
            return self._runs[place]
        start = place * page_size + self.dropped
        return start, start + page_size

"""What a task is to the command: jobs to run, and how each outcome is graded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from chunkwise.evaluation.bootstrap import Metric
from chunkwise.evaluation.jobs import Job, Outcome


@dataclass(frozen=True, slots=True)
class Grade:
    """``statistics`` holds, for every metric of the task, what the item adds to its sums; ``details`` is whatever else
    is worth keeping of the item, as JSON values."""

    statistics: Mapping[str, Sequence[float]]
    details: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """One data set with its metrics."""

    @property
    def jobs(self) -> Sequence[Job]:
        """The selected items, in the data's order; their keys differ."""
        ...

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics by name, the headline first."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Settings, beside data and selection, that the result depends on, as JSON values."""
        ...

    def grade(self, outcome: Outcome) -> Grade:
        """Grades the outcome of one of the jobs."""
        ...

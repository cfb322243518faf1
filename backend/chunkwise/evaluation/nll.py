"""Negative log-likelihoods of given tokens, one by one, with the rank that each of them cost.

For experiments::

    scores = evaluate_nll(evaluator, [Passage("a", ids, first=256)], mode)
    scores[0].nll      # nats of ids[256], ids[257], …
    scores[0].ranks    # active rank of the positions that predicted them: 255, 256, …
    scores[0].trace    # all positions' ranks, chunk starts and cross-fades as executed, KV bytes

With ``scoring="prompt"`` the whole passage is a prompt, and steered as one; with "decode" what precedes the first
scored token is the prompt, and the rest is steered by the model's signals as if it were being generated. Under a fixed
rung or without steering both give the same numbers, and "prompt" is much faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkwise.config.eval_settings import Scoring
from chunkwise.evaluation.driver import Evaluator
from chunkwise.evaluation.jobs import Job, Outcome
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.trace import Trace


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids of which those from position ``first`` on are scored; the ones before are context, at least one."""

    key: str
    ids: tuple[int, ...]
    first: int

    def __post_init__(self) -> None:
        assert 1 <= self.first < len(self.ids), "at least one token must come before the first scored one"


@dataclass(frozen=True, slots=True)
class PassageScore:
    """``nll[i]`` is that of position ``first + i``, in nats."""

    key: str
    first: int
    nll: tuple[float, ...]
    trace: Trace

    @property
    def ranks(self) -> list[float]:
        """The active rank of each scored token: of the position before it, whose output predicts it."""
        return self.trace.ranks()[self.first - 1 : self.first - 1 + len(self.nll)]


def passage_job(passage: Passage, scoring: Scoring) -> Job:
    """The job whose outcome `passage_score` reads."""
    if scoring == "prompt":
        return Job(passage.key, passage.ids, prompt_logprobs=True, answer_start=passage.first)
    return Job(passage.key, passage.ids[: passage.first], forced_ids=passage.ids[passage.first :])


def passage_score(outcome: Outcome) -> PassageScore:
    """The score of a passage from its job's outcome."""
    job = outcome.job
    logprobs = outcome.prompt_logprobs[job.boundary - 1 :] if job.prompt_logprobs else outcome.logprobs
    return PassageScore(job.key, job.boundary, tuple(-logprob for logprob in logprobs), outcome.trace)


def evaluate_nll(
    evaluator: Evaluator, passages: Sequence[Passage], mode: SteeringMode, scoring: Scoring = "prompt"
) -> list[PassageScore]:
    """Scores passages, in batches, and returns them in order.

    Raises:
        InvalidRequest: a passage longer than the model or the evaluator's KV cache.
        GenerationFailed: a passage cannot be computed.
    """
    jobs = [passage_job(passage, scoring) for passage in passages]
    return [passage_score(outcome) for outcome in evaluator.run(jobs, mode)]

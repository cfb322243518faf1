"""Sequences to run, and what comes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from chunkwise.core import Generation, GenerationFailed, GenerationRequest, SamplingParams, StoppingParams
from chunkwise.evaluation.trace import Trace


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to run: a prompt, then ``forced_ids`` one by one (teacher forcing), or else a greedy answer that
    ends at end of sequence, at a ``stop`` text or after ``max_new_tokens``.

    ``key`` names it in errors and results. Positions from ``answer_start`` on (None: behind the prompt) count as answer
    where ranks are reported; ``prompt_logprobs`` asks for those of the prompt's own tokens.
    """

    key: str
    prompt_ids: tuple[int, ...]
    forced_ids: tuple[int, ...] = ()
    max_new_tokens: int = 1
    stop: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    answer_start: int | None = None

    @property
    def new_tokens(self) -> int:
        """The most tokens that follow the prompt."""
        return len(self.forced_ids) or self.max_new_tokens

    @property
    def boundary(self) -> int:
        """The first position that counts as answer."""
        return len(self.prompt_ids) if self.answer_start is None else self.answer_start

    def request(self, id: int, adapter: str | None) -> GenerationRequest:
        """The job as an engine takes it."""
        return GenerationRequest(
            id=id,
            inputs="",
            sampling=SamplingParams(),
            stopping=StoppingParams(self.new_tokens, self.stop, ignore_eos=bool(self.forced_ids)),
            prompt_ids=self.prompt_ids,
            adapter_id=adapter,
            prefill_logprobs=self.prompt_logprobs,
            forced_ids=self.forced_ids,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job. ``logprobs`` (natural logarithms) run parallel to ``ids``, the answer's tokens;
    ``prompt_logprobs``, if asked for, are those of the prompt's tokens from the second on. ``text`` is the answer
    without special tokens."""

    job: Job
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float, ...]
    text: str
    trace: Trace


@dataclass(slots=True)
class PartialOutcome:
    """What has come of a job so far."""

    job: Job
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] = ()
    text: str = ""

    def take(self, generation: Generation) -> None:
        """Adds one step's token. Raises GenerationFailed if the sequence failed."""
        if generation.error is not None:
            raise GenerationFailed(f"item {self.job.key!r} failed: {generation.error.message}")
        self.ids.append(generation.token.id)
        self.logprobs.append(generation.token.logprob)
        if generation.prefill_tokens:
            self.prompt_logprobs = tuple(token.logprob for token in generation.prefill_tokens[1:])
        if generation.text is not None:
            self.text = generation.text.text

    def complete(self, trace: Trace) -> Outcome:
        """The outcome, once the sequence has ended."""
        return Outcome(self.job, tuple(self.ids), tuple(self.logprobs), self.prompt_logprobs, self.text, trace)

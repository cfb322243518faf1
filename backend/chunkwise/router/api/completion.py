"""A validated request to its whole answer, or to the answer's events one by one. Knows nothing of HTTP.

Whatever happens here, a client that goes away included, the request leaves the loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from chunkwise.core import GeneratedText, GenerationFailed, InvalidRequest, Overloaded, Token
from chunkwise.router.answer import Answer, Ending
from chunkwise.router.api.schema import GenerateParameters
from chunkwise.router.api.serving import Serving
from chunkwise.router.api.validation import ValidRequest
from chunkwise.steering import SteeringReport


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of one request in seconds, from its arrival on."""

    validation: float
    queue: float
    inference: float

    @property
    def total(self) -> float:
        """From arrival to the last token."""
        return self.validation + self.queue + self.inference


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    prefill: tuple[Token, ...]
    tokens: tuple[Token, ...]
    top_tokens: tuple[tuple[Token, ...], ...]
    text: GeneratedText
    report: SteeringReport
    timings: Timings

    @property
    def mean_logprob(self) -> float:
        """Mean of the tokens' logprobs; a token that has none counts as impossible."""
        return sum(-math.inf if math.isnan(t.logprob) else t.logprob for t in self.tokens) / len(self.tokens)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A valid request and the time, in seconds of the loop's clock, at which it came and took to be validated."""

    valid: ValidRequest
    at: float
    validation: float

    def timings(self, answer: Answer, now: float) -> Timings:
        """Durations of an answer that is complete now."""
        started = answer.started_at if answer.started_at is not None else now
        return Timings(self.validation, started - answer.submitted_at, now - started)


@asynccontextmanager
async def received(
    serving: Serving, inputs: str, parameters: GenerateParameters, *, stream: bool
) -> AsyncIterator[Arrival]:
    """Validates a request and counts it, its errors and its going away.

    Raises:
        Overloaded: as many requests as allowed are inside the server.
        InvalidRequest: see `Validator.validate`.
    """
    metrics, clock = serving.metrics, serving.loop.clock
    metrics.request_count.inc()
    began = clock()
    try:
        with serving.permits.hold():
            valid = await serving.validator.validate(inputs, parameters, stream=stream)
            validation = clock() - began
            metrics.validation_duration.observe(validation)
            metrics.input_length.observe(valid.input_length)
            metrics.max_new_tokens.observe(valid.generation.stopping.max_new_tokens)
            yield Arrival(valid, began, validation)
    except (asyncio.CancelledError, GeneratorExit):
        metrics.request_failure.inc("dropped")
        raise
    except Overloaded:
        metrics.request_failure.inc("overloaded")
        raise
    except InvalidRequest:
        metrics.request_failure.inc("validation")
        raise
    except GenerationFailed:
        metrics.request_failure.inc("generation")
        raise
    metrics.request_success.inc()


async def collect(serving: Serving, arrival: Arrival) -> tuple[Completion, ...]:
    """All ``best_of`` answers, the best (highest mean logprob) first. If one fails, all are given up."""
    if arrival.valid.best_of == 1:
        return (await _collect_one(serving, arrival),)
    draw = serving.validator.draw_seed
    variants = [replace(arrival, valid=_reseeded(arrival.valid, draw())) for _ in range(arrival.valid.best_of)]
    tasks = [asyncio.create_task(_collect_one(serving, variant)) for variant in variants]
    try:
        completions = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return tuple(sorted(completions, key=lambda completion: completion.mean_logprob, reverse=True))


def record(serving: Serving, timings: Timings, text: GeneratedText) -> None:
    """Counts the durations of one complete answer."""
    metrics = serving.metrics
    metrics.request_duration.observe(timings.total)
    metrics.queue_duration.observe(timings.queue)
    metrics.inference_duration.observe(timings.inference)
    metrics.time_per_token.observe(timings.inference / max(1, text.generated_tokens))
    metrics.generated_tokens.observe(text.generated_tokens)


async def _collect_one(serving: Serving, arrival: Arrival) -> Completion:
    answer = serving.loop.submit(arrival.valid.generation)
    prefill: tuple[Token, ...] = ()
    tokens: list[Token] = []
    tops: list[tuple[Token, ...]] = []
    ending: Ending | None = None
    try:
        async for event in answer:
            prefill = prefill or event.prefill_tokens
            tokens.append(event.token)
            tops.append(event.top_tokens)
            ending = event.ending
    finally:
        answer.cancel()
    assert ending is not None, "iteration ends with the ending or with an error"
    timings = arrival.timings(answer, serving.loop.clock())
    top_tokens = tuple(tops) if arrival.valid.generation.top_n_tokens else ()
    return Completion(prefill, tuple(tokens), top_tokens, ending.text, ending.report, timings)


def _reseeded(valid: ValidRequest, seed: int) -> ValidRequest:
    sampling = replace(valid.generation.sampling, seed=seed)
    return replace(valid, generation=replace(valid.generation, sampling=sampling))

"""One request as its client holds it: events to iterate over, an end, a way to give up. Knows nothing of batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from chunkwise.core import ChunkwiseError, GeneratedText, Token
from chunkwise.steering import SteeringReport


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended, and what steering did to its prompt and answer."""

    text: GeneratedText
    report: SteeringReport


@dataclass(frozen=True, slots=True)
class Event:
    """One generated token. ``ending`` is set on the last event and on no other; ``prefill_tokens``, the prompt with its
    logprobs, on the first, if the request asked for it and the server computes it."""

    token: Token
    top_tokens: tuple[Token, ...] = ()
    ending: Ending | None = None
    prefill_tokens: tuple[Token, ...] = ()


class Answer:
    """The events of one request, in order, each once.

    Iteration ends after the event that carries the ending, or raises the error that ended the request. Whoever iterates
    must call `cancel` when done for whatever reason; after the end it does nothing. Times are in seconds of the loop's
    clock; ``started_at`` is when the first step with the request was launched.
    """

    def __init__(self, request_id: int, submitted_at: float, give_up: Callable[[int], None]) -> None:
        self.request_id = request_id
        self.submitted_at = submitted_at
        self.started_at: float | None = None
        self._give_up = give_up
        self._events: asyncio.Queue[Event | ChunkwiseError] = asyncio.Queue()
        self._ended = False
        self._exhausted = False

    def push(self, event: Event) -> None:
        """Adds the next event."""
        self._ended = event.ending is not None
        self._events.put_nowait(event)

    def fail(self, error: ChunkwiseError) -> None:
        """Ends the request with an error."""
        self._ended = True
        self._events.put_nowait(error)

    def cancel(self) -> None:
        """Gives the request up; it leaves the batch before the next step."""
        if not self._ended:
            self._ended = True
            self._give_up(self.request_id)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Event:
        if self._exhausted:
            raise StopAsyncIteration
        item = await self._events.get()
        if isinstance(item, ChunkwiseError):
            self._exhausted = True
            raise item
        self._exhausted = item.ending is not None
        return item

"""Requests that wait for a place in the batch, and the budgets that let them in. Pure: no clock, no IO."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from chunkwise.core import GenerationRequest, InvalidRequest


@dataclass(frozen=True, slots=True)
class Capacity:
    """What may run at once. Token limits count token positions; ``page_size`` is in positions too.

    ``prefill_tokens`` bounds the tokens that one step computes, ``total_tokens`` is what the KV cache holds in full
    pages, ``batch_size`` bounds the number of live requests (None: unbounded). ``growth_tokens``, at least 1, is how
    much of its answer to come each live request has room kept for.
    """

    page_size: int
    prefill_tokens: int
    total_tokens: int
    batch_size: int | None = None
    growth_tokens: int = 64

    def pages(self, positions: int) -> int:
        """Full pages that so many positions take."""
        return -(-positions // self.page_size)

    def reserved(self, request: GenerationRequest) -> int:
        """Positions that a request may come to hold: prompt and longest answer, rounded up to whole pages."""
        return self.pages(prompt_length(request) + request.stopping.max_new_tokens) * self.page_size

    @property
    def most_growth(self) -> int:
        """The most that `growth` may be."""
        return self.pages(self.growth_tokens)

    def growth(self, request: GenerationRequest, generated: int) -> int:
        """Pages that a request with so many generated tokens takes for its next ``growth_tokens``, at most."""
        known, longest = prompt_length(request) + generated, prompt_length(request) + request.stopping.max_new_tokens
        return self.pages(min(known + self.growth_tokens, longest)) - self.pages(known)


def prompt_length(request: GenerationRequest) -> int:
    """Number of prompt tokens; the router always knows them."""
    assert request.prompt_ids is not None, "the router tokenises every prompt"
    return len(request.prompt_ids)


def known_length(request: GenerationRequest) -> int:
    """Number of tokens to be computed before a request gets its next one: prompt and resumed answer."""
    return prompt_length(request) + len(request.resumed_ids)


class Backlog:
    """First come, first served. The request at the head is never overtaken, so none can starve; one that was pre-empted
    is older than all that wait, and comes back to the head."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._waiting: dict[int, GenerationRequest] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: GenerationRequest) -> None:
        """Appends a request.

        Raises:
            InvalidRequest: it would not fit even an empty batch, so it would block the queue for ever.
        """
        needed = self._capacity.reserved(request)
        if needed > self._capacity.total_tokens:
            raise InvalidRequest(
                f"the request needs {needed} tokens of KV cache (prompt and max_new_tokens, in whole pages of "
                f"{self._capacity.page_size}) but the cache holds {self._capacity.total_tokens}; "
                "shorten the prompt or lower max_new_tokens"
            )
        self._waiting[request.id] = request

    def put_back(self, request: GenerationRequest) -> None:
        """Puts a request that was pre-empted, the youngest of the live ones, at the head."""
        self._waiting = {request.id: request, **self._waiting}

    def remove(self, request_id: int) -> GenerationRequest | None:
        """Drops a waiting request; None if it does not wait here."""
        return self._waiting.pop(request_id, None)

    def lacks(self, spare_pages: int) -> bool:
        """Whether the request at the head waits for more than ``spare_pages`` pages."""
        head = next(iter(self._waiting.values()), None)
        return head is not None and self._pages(head) > spare_pages

    def next_batch(
        self, live: Collection[GenerationRequest], current_tokens: int, spare_pages: int | None = None
    ) -> tuple[GenerationRequest, ...]:
        """Takes out the requests that may join ``live`` now, in order of arrival.

        ``spare_pages`` are those that are free beyond what the live requests need and may grow by; None, if nobody
        knows, reserves the longest answer for each. ``current_tokens`` is what the live batch's next step computes
        anyway. A prompt longer than what is left of the step's budget is let in as the last one, with ``chunk_len`` set
        to that rest (TGI's chunked mode). With nothing live the head of the queue always gets in.
        """
        if not self._waiting:
            return ()
        capacity = self._capacity
        needs = capacity.reserved if spare_pages is None else self._pages
        room = capacity.total_tokens - sum(map(capacity.reserved, live)) if spare_pages is None else spare_pages
        prefill = capacity.prefill_tokens - current_tokens
        admitted: list[GenerationRequest] = []
        for request in self._waiting.values():
            room -= needs(request)
            full = capacity.batch_size is not None and len(live) + len(admitted) >= capacity.batch_size
            if full or room < 0 or prefill <= 0:
                break
            length = known_length(request)
            admitted.append(replace(request, chunk_len=prefill) if length > prefill else request)
            prefill -= length
        for request in admitted:
            del self._waiting[request.id]
        return tuple(admitted)

    def _pages(self, request: GenerationRequest) -> int:
        """Pages that a request needs to be let in: for its tokens, and to grow."""
        capacity = self._capacity
        return capacity.pages(known_length(request)) + capacity.growth(request, len(request.resumed_ids))

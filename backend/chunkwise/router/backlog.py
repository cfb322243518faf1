"""Requests that wait for a place in the batch, and the token budgets that let them in. Pure: no clock, no IO."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from chunkwise.core import GenerationRequest, InvalidRequest


@dataclass(frozen=True, slots=True)
class Capacity:
    """What may run at once. Token limits count token positions; ``page_size`` is in positions too.

    ``prefill_tokens`` bounds the tokens that one step computes, ``total_tokens`` what all live requests may ever hold
    in the KV cache, ``batch_size`` their number (None: unbounded).
    """

    page_size: int
    prefill_tokens: int
    total_tokens: int
    batch_size: int | None = None

    def reserved(self, request: GenerationRequest) -> int:
        """Positions held for a request until it ends: prompt and longest answer, rounded up to whole pages."""
        positions = prompt_length(request) + request.stopping.max_new_tokens
        return -(-positions // self.page_size) * self.page_size


def prompt_length(request: GenerationRequest) -> int:
    """Number of prompt tokens; the router always knows them."""
    assert request.prompt_ids is not None, "the router tokenises every prompt"
    return len(request.prompt_ids)


class Backlog:
    """First come, first served. The request at the head is never overtaken, so none can starve."""

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

    def remove(self, request_id: int) -> bool:
        """Drops a waiting request; False if it does not wait here."""
        return self._waiting.pop(request_id, None) is not None

    def next_batch(self, live: Collection[GenerationRequest], current_tokens: int) -> tuple[GenerationRequest, ...]:
        """Takes out the requests that may join ``live`` now, in order of arrival.

        ``current_tokens`` is what the live batch's next step computes anyway. A prompt longer than what is left of the
        step's budget is let in as the last one, with ``chunk_len`` set to that rest (TGI's chunked mode). With nothing
        live the head of the queue always gets in.
        """
        if not self._waiting:
            return ()
        capacity = self._capacity
        tokens = capacity.total_tokens - sum(capacity.reserved(request) for request in live)
        prefill = capacity.prefill_tokens - current_tokens
        admitted: list[GenerationRequest] = []
        for request in self._waiting.values():
            tokens -= capacity.reserved(request)
            full = capacity.batch_size is not None and len(live) + len(admitted) >= capacity.batch_size
            if full or tokens < 0 or prefill <= 0:
                break
            length = prompt_length(request)
            admitted.append(replace(request, chunk_len=prefill) if length > prefill else request)
            prefill -= length
        for request in admitted:
            del self._waiting[request.id]
        return tuple(admitted)

"""Writes the recordings beside it: what TGI's router calls, and what a right answer is, for made-up traffic.

The router's batching loop and a shard that only counts tokens are played against each other; no server is asked. With
chunking, new requests join by a Prefill that names the cached batch, and the last one admitted may get a chunk of its
prompt alone; without, they are prefilled by themselves and the next Decode names both batches.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_PREFILL_TOKENS = 256
HERE = Path(__file__).parent


@dataclass(slots=True)
class Client:
    """A request and its client, who comes at ``arrival`` and may leave at ``departure`` (in turns of the loop).

    ``kind`` says how the answer ends: "length" at ``new`` tokens, "eos" after two, "stop" after one.
    """

    id: int
    tokens: int
    new: int
    adapter: int
    kind: str = "length"
    arrival: int = 0
    departure: int | None = None
    chunk: int | None = None
    left: int = field(init=False)
    generated: int = 0

    def __post_init__(self) -> None:
        self.left = self.tokens

    @property
    def most(self) -> int:
        """Tokens its answer will have."""
        return {"length": self.new, "eos": 2, "stop": 1}[self.kind]

    def asked(self) -> dict[str, Any]:
        """The request as the recording holds it."""
        names = ("id", "tokens", "new", "adapter", "kind", "chunk")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class Recorder:
    """Plays one recording to its end; ``calls`` are its lines."""

    def __init__(self, clients: Sequence[Client], chunking: bool) -> None:
        self._coming = sorted(clients, key=lambda client: client.arrival)
        self._queue: list[Client] = []
        self._chunking = chunking
        self._batches = 0
        self._turn = 0
        self.calls: list[dict[str, Any]] = []

    def play(self) -> None:
        """The router's loop."""
        while self._coming or self._queue:
            self._turn = max(self._turn, self._coming[0].arrival if not self._queue else 0)
            running, name = self._prefill(self._admitted(MAX_PREFILL_TOKENS), [], None)
            while running:
                self._turn += 1
                budget = MAX_PREFILL_TOKENS - (sum(self._next(running).values()) if self._chunking else 0)
                joining = self._admitted(budget)
                names = [name]
                if joining and self._chunking:
                    running, name = self._prefill(joining, running, name)
                    names = [name]
                elif joining:
                    joined, other = self._prefill(joining, [], None)
                    running, names = running + joined, [name, other] if joined else [name]
                if running:
                    running = self._step({"call": "decode", "batches": names}, running, name)

    def _admitted(self, budget: int) -> list[Client]:
        while self._coming and self._coming[0].arrival <= self._turn:
            self._queue.append(self._coming.pop(0))
        admitted: list[Client] = []
        while self._queue and budget > 0:
            client = self._queue[0]
            if client.tokens > budget:
                if not self._chunking:
                    break
                client.chunk = budget
            admitted.append(self._queue.pop(0))
            budget -= client.tokens
        return admitted

    def _prefill(self, joining: list[Client], running: list[Client], cached: int | None) -> tuple[list[Client], int]:
        id, self._batches = self._batches, self._batches + 1
        call = {"call": "prefill", "batch": id, "cached": cached, "requests": [client.asked() for client in joining]}
        name = id if cached is None else cached
        return self._step(call, running + joining, name), name

    def _next(self, running: Sequence[Client]) -> dict[int, int]:
        """Tokens of each request in the next step: one of an answer, or what the budget leaves of a prompt."""
        answering = [client for client in running if client.left <= 1]
        tokens = {client.id: 1 for client in answering}
        budget = MAX_PREFILL_TOKENS - len(answering)
        for client in running:
            if client.id not in tokens:
                wanted = client.left
                if client.left == client.tokens and client.chunk is not None:
                    wanted = client.chunk
                tokens[client.id] = min(wanted, budget)
                budget -= tokens[client.id]
        return tokens

    def _step(self, call: dict[str, Any], running: list[Client], name: int) -> list[Client]:
        tokens = self._next(running)
        for client in running:
            client.left = max(client.left - tokens[client.id], 0)
        spoke = [client for client in running if not client.left]
        for client in spoke:
            client.generated += 1
        ended = [client for client in spoke if client.generated == client.most]
        live = [client for client in running if client not in ended]
        gone = [c for c in spoke if c in live and c.departure is not None and c.departure <= self._turn]
        self.calls.append(
            call
            | {"tokens": [client.id for client in spoke]}
            | ({"ended": {str(client.id): [client.generated, client.kind] for client in ended}} if ended else {})
            | {"name": name, "live": [client.id for client in live], "gone": [client.id for client in gone]}
        )
        kept = [client for client in live if client not in gone]
        if gone and kept:
            self.calls.append({"call": "filter", "batch": name, "live": [client.id for client in kept]})
        elif gone:
            self.calls.append({"call": "clear", "batch": name})
        return kept


def crowd(count: int, seed: int, turns: int, prompts: tuple[int, int], news: tuple[int, int]) -> list[Client]:
    """So many clients; one in eight leaves early, one in eight each ends by a stop sequence or end of sequence."""
    draw = random.Random(seed)
    clients = []
    for id in range(count):
        arrival = 0 if id == 0 else draw.randint(0, turns)
        kind = draw.choice(["length"] * 6 + ["eos", "stop"])
        departure = arrival + draw.randint(1, 4) if kind == "length" and draw.random() < 0.125 else None
        clients.append(Client(id, draw.randint(*prompts), draw.randint(*news), id % 4, kind, arrival, departure))
    clients.sort(key=lambda client: client.arrival)
    for id, client in enumerate(clients):
        client.id = id
    return clients


def recordings() -> dict[str, str]:
    """All recordings as JSON by file name, one call a line."""
    four = [(40, 9, 0, None), (300, 6, 2, None), (30, 12, 3, 6), (8, 3, 3, None)]
    traffic: dict[str, tuple[list[Client], bool]] = {"one": ([Client(0, 30, 5, 0)], True)}
    # The worked example of the contract, 2.14, but for its last call.
    traffic["two_merging"] = ([Client(0, 24, 4, 0), Client(1, 24, 5, 0, arrival=2)], False)
    for chunking, ending in ((True, ""), (False, "_merging")):
        few = [Client(i, min(t, 300 if chunking else 200), n, i, "length", a, d) for i, (t, n, a, d) in enumerate(four)]
        traffic[f"four{ending}"] = (few, chunking)
        traffic[f"sixty_four{ending}"] = (crowd(64, 7, 24, (2, 60), (2, 9)), chunking)
    written = {}
    for name, (clients, chunking) in traffic.items():
        recorder = Recorder(clients, chunking)
        recorder.play()
        lines = ",\n".join(json.dumps(call, separators=(",", ":")) for call in recorder.calls)
        head = f'"chunking": {json.dumps(chunking)}, "max_prefill_tokens": {MAX_PREFILL_TOKENS}'
        written[f"{name}.json"] = f'{{{head}, "calls": [\n{lines}\n]}}\n'
    return written


if __name__ == "__main__":
    for file, text in recordings().items():
        (HERE / file).write_text(text)

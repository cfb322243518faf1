"""TGI's v3 router from its batching task downwards: it hands out ids and blocks, sends the calls, keeps the books.

Works with any tokenizer: a prompt is a text of more words than tokens are wanted, cut to its last tokens by
``truncate``, so that its length in tokens is known without encoding it.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chunkwise.pb import generate_pb2 as pb
from tgi_router import TgiRouter, liveness_request

_SYLLABLES = ["ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za"]
_PARAMETERS = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "seed": 11}


def words(count: int, seed: int) -> str:
    """``count`` different-looking words, at least one token each; the same for the same seed."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(count))


@dataclass(slots=True)
class Answer:
    """What came back for one request so far; ``end`` once it is over."""

    generations: list[pb.Generation] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return [id for generation in self.generations for id in generation.tokens.ids]

    @property
    def logprobs(self) -> list[float]:
        """The log-probabilities of its tokens."""
        return [logprob for generation in self.generations for logprob in generation.tokens.logprobs]

    @property
    def texts(self) -> list[str]:
        """The texts of its tokens."""
        return [text for generation in self.generations for text in generation.tokens.texts]

    @property
    def spoken(self) -> str:
        """The texts of its tokens, special ones left out."""
        return "".join(
            text
            for generation in self.generations
            for text, special in zip(generation.tokens.texts, generation.tokens.is_special, strict=True)
            if not special
        )

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return bool(self.generations) and self.generations[-1].HasField("generated_text")

    @property
    def end(self) -> pb.GeneratedText:
        """How it ended."""
        assert self.ended
        return self.generations[-1].generated_text

    @property
    def error(self) -> str:
        """Why it was refused; empty if it was not, or if the server cannot tell (it knows no field 100)."""
        return self.generations[-1].error.message if self.generations else ""


@dataclass(frozen=True, slots=True)
class Step:
    """The answer to one Prefill or Decode."""

    generations: dict[int, pb.Generation]
    batch: pb.CachedBatch | None


class Blocks:
    """The router's simple allocator: block 0 is never given out."""

    def __init__(self, count: int, size: int) -> None:
        self._free = deque(range(1, count))
        self._size = size

    def take(self, tokens: int) -> list[int]:
        """Blocks for so many tokens, in logical order."""
        return [self._free.popleft() for _ in range(-(-tokens // self._size))]

    def give(self, blocks: Sequence[int]) -> None:
        """Takes blocks back; others get them as late as possible, and in another order."""
        self._free.extend(reversed(blocks))

    def slots(self, blocks: Sequence[int], tokens: int) -> list[int]:
        """The slot of every token."""
        return [block * self._size + place for block in blocks for place in range(self._size)][:tokens]


class Player:
    """One router over one server. ``answers`` holds what every request got.

    Args:
        adapters: names that requests may use.
        base_names: names under which clients ask for the base model.
        eos_ids: the end-of-sequence ids, where they are known.
    """

    def __init__(
        self, router: TgiRouter, adapters: Sequence[str], base_names: Sequence[str], eos_ids: Sequence[int]
    ) -> None:
        self.router = router
        self.info = router.info
        self.adapters = list(adapters)
        self.base_names = list(base_names)
        self.eos_ids = list(eos_ids)
        self.answers: dict[int, Answer] = {}
        self._gone: set[int] = set()
        self._asked: dict[int, pb.Request] = {}
        self._batch_ids = itertools.count()
        self._request_ids = itertools.count()
        capacity = router.limits.max_supported_total_tokens // self.info.block_size
        self._blocks = None if self.info.requires_padding else Blocks(capacity, self.info.block_size)

    @property
    def tells_errors(self) -> bool:
        """Whether the server has ChunkWise's fields."""
        return bool(self.info.adapters)

    def request(
        self,
        tokens: int = 24,
        new: int = 8,
        *,
        seed: int = 0,
        text: str | None = None,
        parameters: dict[str, Any] | None = None,
        stopping: dict[str, Any] | None = None,
        **fields: Any,
    ) -> pb.Request:
        """A greedy request of ``new`` tokens after a prompt of ``tokens``, with blocks; ``fields`` are Request's."""
        text = words(tokens + 1, seed) if text is None else text
        request = pb.Request(
            id=next(self._request_ids),
            inputs=text,
            input_chunks=pb.Input(chunks=[pb.InputChunk(text=text)]),
            truncate=tokens,
            add_special_tokens=True,
            parameters=pb.NextTokenChooserParameters(**{**_PARAMETERS, **(parameters or {})}),
            stopping_parameters=pb.StoppingCriteriaParameters(
                **{"max_new_tokens": new, "ignore_eos_token": True, **(stopping or {})}
            ),
            **fields,
        )
        return self._placed(request)

    def again(self, request: pb.Request) -> pb.Request:
        """The same request under a new id."""
        copy = pb.Request()
        copy.CopyFrom(request)
        copy.id = next(self._request_ids)
        return self._placed(copy)

    def batch(self, requests: Sequence[pb.Request], id: int | None = None) -> pb.Batch:
        """A batch of new requests, as the queue fills it in."""
        return pb.Batch(
            id=next(self._batch_ids) if id is None else id,
            requests=requests,
            size=len(requests),
            max_tokens=sum(r.truncate + r.stopping_parameters.max_new_tokens for r in requests),
            max_blocks=max((len(r.blocks) for r in requests), default=0),
        )

    def prefill(self, *requests: pb.Request, cached: pb.CachedBatch | None = None, id: int | None = None) -> Step:
        """One Prefill on all shards."""
        self._asked |= {request.id: request for request in requests}
        request = pb.PrefillRequest(batch=self.batch(requests, id), cached_batch=cached)
        calls = [shard.Prefill.future(request) for shard in self.router.shards]
        return self._joined([call.result() for call in calls])

    def decode(self, *batches: pb.CachedBatch) -> Step:
        """One Decode on all shards."""
        request = pb.DecodeRequest(batches=batches)
        calls = [shard.Decode.future(request) for shard in self.router.shards]
        return self._joined([call.result() for call in calls])

    def filter(self, batch_id: int, keep: Sequence[int]) -> pb.CachedBatch:
        """One FilterBatch on all shards; the answer must hold a batch."""
        request = pb.FilterBatchRequest(batch_id=batch_id, request_ids=keep)
        answers = [call.result() for call in [shard.FilterBatch.future(request) for shard in self.router.shards]]
        assert answers[-1].HasField("batch")
        return answers[-1].batch

    def probe(self) -> None:
        """The liveness Prefill, on all shards; it leaves no batch."""
        for call in [shard.Prefill.future(liveness_request()) for shard in self.router.shards]:
            assert not call.result(timeout=30).HasField("batch")

    def follow(self, step: Step) -> pb.CachedBatch | None:
        """What the router does after a step: requests that are over or whose client has left are filtered out."""
        if step.batch is None:
            return None
        keep = [id for id in step.batch.request_ids if not self.answer(id).ended and id not in self._gone]
        if len(keep) == step.batch.size:
            return step.batch
        if keep:
            return self.filter(step.batch.id, keep)
        self.router.clear(step.batch.id)
        return None

    def leave(self, request_id: int) -> None:
        """The client goes away."""
        self._gone.add(request_id)
        self._free(request_id)

    def run(self, *requests: pb.Request) -> list[Answer]:
        """Serves requests together to the end."""
        return self.finish(self.follow(self.prefill(*requests)), *requests)

    def finish(self, cached: pb.CachedBatch | None, *requests: pb.Request) -> list[Answer]:
        """Decodes a batch to its end; the answers of ``requests``."""
        while cached is not None:
            cached = self.follow(self.decode(cached))
        assert all(self.answer(request.id).ended for request in requests)
        return [self.answer(request.id) for request in requests]

    def alone(self, request: pb.Request) -> Answer:
        """The answer to the same request when nobody else is there."""
        (answer,) = self.run(self.again(request))
        return answer

    def answer(self, request_id: int) -> Answer:
        """What a request got so far."""
        return self.answers.setdefault(request_id, Answer())

    def held(self) -> int:
        """What the server says it holds of requests; 0 from a server that does not say."""
        states = self.router.states()
        return sum(s.sequences + s.steered_requests + sum(pages.used for pages in s.kv_pages) for s in states)

    def _placed(self, request: pb.Request) -> pb.Request:
        if self._blocks is not None:
            del request.blocks[:], request.slots[:]
            tokens = request.truncate + request.stopping_parameters.max_new_tokens + self.info.speculate - 1
            request.blocks.extend(self._blocks.take(tokens))
            request.slots.extend(self._blocks.slots(request.blocks, tokens))
        return request

    def _free(self, request_id: int) -> None:
        if self._blocks is not None:
            self._blocks.give(self._asked.pop(request_id).blocks)

    def _joined(self, responses: Sequence[pb.PrefillResponse] | Sequence[pb.DecodeResponse]) -> Step:
        generations: dict[int, pb.Generation] = {}
        for generation in (generation for response in responses for generation in response.generations):
            id, tokens = generation.request_id, generation.tokens
            assert id in self._asked or id in self._gone, "a router that gets an id it does not know never works again"
            assert id not in generations, "one shard alone may report a request"
            assert not self.answer(id).ended, "nothing may follow the end"
            assert 1 <= len(tokens.ids) == len(tokens.logprobs) == len(tokens.texts) == len(tokens.is_special)
            generations[id] = generation
            self.answer(id).generations.append(generation)
            if generation.HasField("generated_text") and id not in self._gone:
                self._check_end(id)
                self._free(id)
        assert len({response.batch.SerializeToString() for response in responses}) == 1
        return Step(generations, responses[-1].batch if responses[-1].HasField("batch") else None)

    def _check_end(self, request_id: int) -> None:
        answer, most = self.answer(request_id), self._asked[request_id].stopping_parameters.max_new_tokens
        assert answer.end.generated_tokens == len(answer.ids)
        assert (answer.end.finish_reason == pb.FINISH_REASON_LENGTH) == (len(answer.ids) == most and not answer.error)

"""The calls of a TGI v3 router, byte for byte what its client sends, over a blocking gRPC channel."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import grpc

from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import generate_pb2_grpc as pb_grpc

U64_MAX = 2**64 - 1
Stub = pb_grpc.TextGenerationServiceStub


def text_request(id: int, text: str, new: int = 8, **changes: object) -> pb.Request:
    """A greedy request of ``new`` tokens that ignores end of sequence; ``changes`` replace top-level fields."""
    request = pb.Request(
        id=id,
        inputs=text,
        input_chunks=pb.Input(chunks=[pb.InputChunk(text=text)]),
        truncate=1000,
        add_special_tokens=True,
        parameters=pb.NextTokenChooserParameters(temperature=1, top_p=1, typical_p=1, repetition_penalty=1, seed=11),
        stopping_parameters=pb.StoppingCriteriaParameters(max_new_tokens=new, ignore_eos_token=True),
    )
    request.MergeFrom(pb.Request(**changes))  # type: ignore[arg-type]
    return request


def batch(id: int, requests: Sequence[pb.Request]) -> pb.Batch:
    """A batch of new requests."""
    return pb.Batch(id=id, requests=requests, size=len(requests), max_tokens=999, max_blocks=9)


def warmup_request(
    max_prefill_tokens: int, max_input_tokens: int | None = None, max_total_tokens: int | None = None
) -> pb.WarmupRequest:
    """Requests of id 0 until the prefill budget is full; the first with an image; ``max_new_tokens`` wraps."""
    requests: list[pb.Request] = []
    left = max_prefill_tokens
    while left > 0:
        tokens = min(left, max_input_tokens or left)
        left -= tokens
        text = "_test " * tokens
        new = (max_total_tokens - tokens) % 2**32 if max_total_tokens is not None else 1
        request = text_request(0, text, new, prefill_logprobs=True, top_n_tokens=20)
        request.truncate = tokens
        request.parameters.CopyFrom(
            pb.NextTokenChooserParameters(
                temperature=0.9,
                top_k=10,
                top_p=0.9,
                typical_p=0.9,
                repetition_penalty=1.2,
                frequency_penalty=0.1,
                watermark=True,
            )
        )
        if not requests:
            request.inputs += "![](data:image/jpeg;base64,iVBORw0KGgo=)"
            image = pb.Image(data=b"\x89PNG\r\n\x1a\n", mimetype="image/jpeg;base64")
            request.input_chunks.chunks.append(pb.InputChunk(image=image))
        requests.append(request)
    return pb.WarmupRequest(
        batch=pb.Batch(id=0, requests=requests, size=len(requests), max_tokens=max_input_tokens or 0),
        max_input_tokens=max_input_tokens,
        max_prefill_tokens=max_prefill_tokens,
        max_total_tokens=max_total_tokens,
    )


def liveness_request() -> pb.PrefillRequest:
    """The probe that an unhealthy router sends, also while a step runs."""
    probe = text_request(U64_MAX, "liveness", new=1, blocks=[0], slots=[0])
    probe.truncate, probe.add_special_tokens = 1, False
    return pb.PrefillRequest(batch=pb.Batch(id=U64_MAX, requests=[probe], size=1, max_tokens=2, max_blocks=1))


class TgiRouter:
    """A router connected to the shards that the master's ServiceDiscovery names, after its whole start-up."""

    def __init__(self, uds_path: str, max_prefill_tokens: int = 256, **limits: int) -> None:
        self._open = ExitStack()
        master = self._connect(f"{uds_path}-0")
        self.urls = list(master.ServiceDiscovery(pb.ServiceDiscoveryRequest()).urls)
        self.shards = [self._connect(url.removeprefix("unix://")) for url in self.urls]
        self.clear()
        self.info = [shard.Info(pb.InfoRequest()) for shard in self.shards][-1]
        warmup = warmup_request(max_prefill_tokens, **limits)
        calls = [shard.Warmup.future(warmup) for shard in self.shards]
        self.limits: pb.WarmupResponse = min((call.result() for call in calls), key=_limits)
        self.tokens: dict[int, list[int]] = {}
        self.texts: dict[int, pb.GeneratedText] = {}

    def __enter__(self) -> TgiRouter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def prefill(
        self, batch_id: int, requests: Sequence[pb.Request], cached: pb.CachedBatch | None = None
    ) -> pb.CachedBatch | None:
        """The batch that goes on."""
        request = pb.PrefillRequest(batch=batch(batch_id, requests), cached_batch=cached)
        calls = [shard.Prefill.future(request) for shard in self.shards]
        return self._joined([call.result() for call in calls])

    def decode(self, *batches: pb.CachedBatch) -> pb.CachedBatch | None:
        """The batch that goes on."""
        request = pb.DecodeRequest(batches=batches)
        calls = [shard.Decode.future(request) for shard in self.shards]
        return self._joined([call.result() for call in calls])

    def filter(self, cached: pb.CachedBatch, keep: Sequence[int]) -> pb.CachedBatch:
        """The batch that goes on."""
        request = pb.FilterBatchRequest(batch_id=cached.id, request_ids=keep)
        calls = [shard.FilterBatch.future(request) for shard in self.shards]
        return [call.result() for call in calls][-1].batch

    def clear(self, id: int | None = None) -> None:
        """Forgets one batch, or all."""
        for call in [shard.ClearCache.future(pb.ClearCacheRequest(id=id)) for shard in self.shards]:
            call.result()

    def run(self, *requests: pb.Request, batch_id: int = 0) -> dict[int, list[int]]:
        """Serves requests together to the end; the tokens of each."""
        cached = self.prefill(batch_id, requests)
        while cached is not None:
            cached = self.decode(cached)
        return {request.id: self.tokens.pop(request.id) for request in requests}

    def states(self) -> list[pb.ShardState]:
        """What each shard holds."""
        return [shard.Health(pb.HealthRequest()).shard_state for shard in self.shards]

    def _connect(self, path: str) -> Stub:
        channel = self._open.enter_context(grpc.insecure_channel(f"unix:{path}"))
        grpc.channel_ready_future(channel).result(timeout=5)
        return Stub(channel)

    def _joined(self, responses: Sequence[pb.PrefillResponse] | Sequence[pb.DecodeResponse]) -> pb.CachedBatch | None:
        seen: set[int] = set()
        for generation in (generation for response in responses for generation in response.generations):
            assert generation.request_id not in seen, "one shard alone may report a request"
            seen.add(generation.request_id)
            assert len(generation.tokens.ids) == 1
            self.tokens.setdefault(generation.request_id, []).extend(generation.tokens.ids)
            if generation.HasField("generated_text"):
                self.texts[generation.request_id] = generation.generated_text
        assert len({response.batch.SerializeToString() for response in responses}) == 1
        return responses[-1].batch if responses[-1].HasField("batch") else None


def _limits(answer: pb.WarmupResponse) -> tuple[int, int, int]:
    return answer.max_supported_total_tokens, answer.max_input_tokens, answer.max_total_tokens

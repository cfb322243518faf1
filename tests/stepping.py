"""Drives `Llama` step by step without the engine: sequences by name, next-token logits out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from chunkwise.core import ChunkDecision, GenerationRequest, KvFormat, SamplingParams, StoppingParams
from chunkwise.kv.cache import KvCache
from chunkwise.model.llama import Llama, target_slices
from chunkwise.model.parallel import Group, SingleProcess
from chunkwise.shard.detokenizer import Detokenizer
from chunkwise.shard.packing import pack
from chunkwise.shard.sampler import TokenChooser
from chunkwise.shard.scheduler import Span
from chunkwise.shard.sequence import Sequence
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.format import load_adapter
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.store import AdapterStore

CPU = torch.device("cpu")


class Stepper:
    """A model, a cache and named sequences."""

    def __init__(
        self,
        model_dir: Path,
        adapters: dict[str, Path] | None = None,
        *,
        group: Group | None = None,
        dtype: torch.dtype = torch.float32,
        page_size: int = 16,
    ) -> None:
        kernels = 1 if dtype == torch.float32 else None
        self.model = Llama(model_dir, group or SingleProcess(), dtype, CPU, kernel_threads=kernels)
        self.store = AdapterStore(target_slices(self.model.spec, self.model.plan), dtype, CPU)
        for name, path in (adapters or {}).items():
            self.store.add(build_ladder(load_adapter(path, name, self.model.spec.target_shapes())))
        shape = self.model.kv_shape(page_size)
        self.cache = KvCache(shape, dtype, CPU, 256 * shape.page_bytes(dtype)[KvFormat.FULL])
        self.tokenizer = Tokenizer(model_dir)
        self.sequences: dict[str, Sequence] = {}
        self.chunks: dict[int, list[ChunkDecision]] = {}
        self.spread: Tensor | None = None

    def prefill(self, name: str, ids: list[int], adapter: str | None = None) -> Tensor:
        """Appends ``ids`` to a sequence (a new one takes ``adapter``) and returns its next-token logits ``[V]``."""
        if name not in self.sequences:
            request = GenerationRequest(len(self.sequences), "", SamplingParams(), StoppingParams(1))
            self.sequences[name] = Sequence(
                request,
                0,
                [],
                TokenChooser(request.sampling, []),
                Detokenizer(self.tokenizer, [], ()),
                self.store.get(adapter) if adapter else None,
            )
        self.sequences[name].ids.extend(ids)
        return self._run([Span(self.sequences[name], len(ids))])[0]

    def decode(self, tokens: dict[str, int]) -> dict[str, Tensor]:
        """One token for each named sequence, in one batch."""
        for name, token in tokens.items():
            self.sequences[name].ids.append(token)
        logits = self._run([Span(self.sequences[name], 1) for name in tokens])
        return dict(zip(tokens, logits, strict=True))

    def _run(self, spans: list[Span]) -> Tensor:
        page_size = self.cache.shape.page_size
        for span in spans:
            while len(span.sequence.pages) * page_size < span.context:
                span.sequence.pages.append(self.cache.allocator.allocate(KvFormat.FULL))
        for span in spans:
            span.sequence.chunks = self.chunks.get(span.sequence.request.id, [])
        step = pack(spans, page_size, CPU)
        output = self.model.forward(step, self.cache)
        self.spread = output.attention_spread
        for span in spans:
            span.sequence.computed = span.context
        return output.logits

"""The LLaMA itself: one model for prefill and decode, with and without LoRA, on one rank or many.

It computes what a `StepInput` says; it does not know requests, sampling or steering.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from chunkwise.kv.cache import KvCache, KvShape
from chunkwise.model.decoder import Decoder, TorchDecoder
from chunkwise.model.graphs import with_graphs
from chunkwise.model.kernel_decoder import KernelDecoder
from chunkwise.model.loading import load_weights, target_slices
from chunkwise.model.parallel import Group, plan_shard
from chunkwise.model.rotary import Rotary
from chunkwise.model.spec import load_spec
from chunkwise.model.step import StepInput, StepOutput
from chunkwise_adapters.ops import GatedLora, choose_op

__all__ = ["Llama", "target_slices"]

_SCORED_ROWS = 128


class Llama:
    """One rank of a LLaMA. Embedding and head are divided by vocabulary rows.

    Args:
        storage: the type the base matrices are kept in: ``dtype`` itself (None), bfloat16, int8 with a scale
            per row, or `linear.FOUR_BITS` (layers alone; see `linear.Matrix`); norms, biases, adapters and the KV cache
            are in ``dtype``.
        kernel_threads: compute with the CPU kernels on so many threads, in fp32; None: with torch operations, which
            every device and type has.
        cuda_graphs: record decode steps as CUDA graphs, where `graphs.with_graphs` can.
        lora: the LoRA operator of the torch operations; None: the fastest on this device.
    """

    def __init__(
        self,
        model_dir: Path,
        group: Group,
        dtype: torch.dtype,
        device: torch.device,
        *,
        storage: torch.dtype | None = None,
        kernel_threads: int | None = None,
        cuda_graphs: bool = False,
        lora: GatedLora | None = None,
    ) -> None:
        self.spec = load_spec(model_dir)
        self.dtype = dtype
        self.storage = storage or dtype
        self.device = device
        self.group = group
        self.plan = plan_shard(self.spec, group.rank, group.world_size)
        weights = load_weights(
            model_dir,
            self.spec,
            self.plan,
            group.rank,
            dtype,
            device,
            storage=self.storage,
            lora=lora or choose_op(device),
        )
        self._no_scores = torch.empty(0, device=device)
        self._observe_scored: Callable[[Tensor], None] | None = None
        rotary = Rotary(self.spec, device)
        self._decoder: Decoder
        if kernel_threads is None:
            self._decoder = TorchDecoder(self.spec, self.plan, weights, group, rotary)
            if cuda_graphs:
                self._decoder = with_graphs(self._decoder, self.spec, group, device)
        else:
            self._decoder = KernelDecoder(self.spec, self.plan, weights, group, rotary, kernel_threads)

    def kv_shape(self, page_size: int) -> KvShape:
        """Shape of the KV cache this rank needs."""
        return KvShape(self.spec.layers, self.plan.n_kv_heads, self.spec.head_dim, page_size)

    def watch_scored(self, observe: Callable[[Tensor], None] | None) -> None:
        """Calls ``observe`` with the logits [n, vocabulary] of every run of scored prompt rows, in the order in which
        their scores are returned. They are the caller's for the call alone."""
        self._observe_scored = observe

    @torch.inference_mode()
    def forward(self, step: StepInput, cache: KvCache) -> StepOutput:
        """One step: writes keys and values to ``cache`` and returns next-token logits of every sequence."""
        x, spread = self._decoder.run(step, cache)
        return StepOutput(self._logits(x, step.last_rows), self._scores(x, step), spread)

    def _logits(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.group.gather_columns(self._decoder.logits(x, rows), self.spec.vocab)

    def _scores(self, x: Tensor, step: StepInput) -> Tensor:
        if step.scored_rows.shape[0] == 0:
            return self._no_scores
        # Some rows at a time: the logits of a whole prompt would be far larger than the model.
        parts = []
        for start in range(0, step.scored_rows.shape[0], _SCORED_ROWS):
            rows, ids = (t[start : start + _SCORED_ROWS] for t in (step.scored_rows, step.scored_ids))
            logits = self._logits(x, rows)
            if self._observe_scored is not None:
                self._observe_scored(logits)
            parts.append(logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0])
        return torch.cat(parts)

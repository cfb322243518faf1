"""Second moments of an adapter's shrink outputs, gathered while the serving engine reads calibration text.

Only ``r × r`` sums are kept, never ``d × d`` ones. It does not know what they are used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from chunkwise.evaluation.calibration_text import CalibrationText
from chunkwise.evaluation.driver import Evaluator, make_engine
from chunkwise.evaluation.jobs import Job
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.model.llama import Llama, target_slices
from chunkwise.model.parallel import SingleProcess
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.format import LoraWeights, ModuleKey
from chunkwise_adapters.gate import LoraSegment
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.ops import GatedLora, choose_op
from chunkwise_adapters.store import AdapterStore
from chunkwise_adapters.whitening import Calibration, ShrinkMoments

_STEP_TOKENS = 1024


class MomentRecorder:
    """A gated LoRA operator that also sums ``h hᵀ`` with ``h = A x`` over every token that uses the adapter.

    Semantics: as ``op``, then ``sums[key] += Σ_t h_t h_tᵀ``; h in the type of x, sums in fp64.
    """

    def __init__(self, op: GatedLora, weights: LoraWeights, dtype: torch.dtype, device: torch.device) -> None:
        self._op = op
        self._a = {key: pair.a.to(device, dtype) for key, pair in weights.modules.items()}
        self.sums = {
            key: torch.zeros(pair.trained_rank, pair.trained_rank, dtype=torch.float64, device=device)
            for key, pair in weights.modules.items()
        }

    def __call__(self, y: Tensor, x: Tensor, segments: Sequence[LoraSegment], key: ModuleKey) -> None:
        """Adds the adapter's output to ``y`` [T, out] in place, given ``x`` [T, in]."""
        self._op(y, x, segments, key)
        if key in self.sums:
            for segment in segments:
                h = (x[segment.rows] @ self._a[key].T).double()
                self.sums[key] += h.T @ h


def collect_moments(
    model_dir: Path, weights: LoraWeights, text: CalibrationText, dtype: torch.dtype, device: torch.device
) -> ShrinkMoments:
    """The second moments of ``weights`` over ``text``: the model reads every window as a prompt of its own, with the
    adapter at full rank.

    Raises:
        UnsupportedModel: the checkpoint cannot be served.
        InvalidRequest: a window is longer than the model's context.
    """
    recorder = MomentRecorder(choose_op(device), weights, dtype, device)
    model = Llama(model_dir, SingleProcess(), dtype, device, lora=recorder)
    store = AdapterStore(target_slices(model.spec, model.plan), dtype, device)
    store.add(build_ladder(weights))
    batch_tokens = _STEP_TOKENS + 2 * max(len(window.ids) for window in text.windows)
    engine, decisions = make_engine(model_dir, model, store, batch_tokens)
    evaluator = Evaluator(engine, decisions, Tokenizer(model_dir), batch_tokens, _STEP_TOKENS)
    jobs = [Job(f"window {i}", window.ids) for i, window in enumerate(text.windows)]
    evaluator.run(jobs, SteeringMode("full", weights.name))
    second = {key: (total / text.tokens).cpu() for key, total in recorder.sums.items()}
    return ShrinkMoments(weights.content_hash, Calibration(text.text_hash, text.tokens), second)

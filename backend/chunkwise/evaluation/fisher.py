"""How sensitive the loss is to every rank of an adapter: gradients of gates, from transformers' LLaMA, which unlike the
serving engine can be differentiated."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chunkwise.core import ChunkwiseError
from chunkwise.evaluation.calibration_text import CalibrationText
from chunkwise.evaluation.progress import open_progress
from chunkwise_adapters.format import LoraWeights, ModuleKey
from chunkwise_adapters.ladder import LadderModule, build_ladder
from chunkwise_adapters.sensitivity import Sensitivity
from chunkwise_adapters.whitening import Calibration

# How much of the adapter is on while gradients are taken. A ladder is for ranks between none and all, where the loss is
# not what it is at either end; half-way did best on three adapters (experiments/README.md).
_STRENGTH = 0.5


class MissingTransformers(ChunkwiseError):
    """The package that gradients need is not installed."""


def measure_sensitivity(model_dir: Path, weights: LoraWeights, text: CalibrationText) -> Sensitivity:
    """The sensitivity of the loss on what ``text`` scores, in fp32, one window at a time.

    Raises:
        MissingTransformers: it is not installed.
        OSError: it cannot load the checkpoint.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingTransformers(
            f"a sensitive ladder needs transformers ({error}): pip install 'chunkwise[eval]', or choose --kind plain"
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = transformers.LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
    model.requires_grad_(False)
    gates = [_Gates(key, module, device) for key, module in build_ladder(weights).modules.items()]
    for gate in gates:
        layer, target = gate.key
        part = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        model.get_submodule(f"model.layers.{layer}.{part}.{target}").register_forward_hook(gate.forward)
    scored = [window for window in text.windows if window.first < len(window.ids)]
    progress = open_progress(len(scored), 0)
    for ids, first in scored:
        tokens = torch.tensor([ids], device=device)
        # Without an input that needs a gradient there would be no graph.
        embedded = model.get_input_embeddings()(tokens).requires_grad_(True)
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        loss = cross_entropy(logits[0, first - 1 : -1], tokens[0, first:], reduction="sum")
        torch.autograd.backward([loss])
        progress.update(1)
    progress.close()
    count = sum(len(window.ids) for window in scored)
    fisher = {gate.key: (gate.squares / max(count, 1)).cpu() for gate in gates}
    return Sensitivity(weights.content_hash, Calibration(text.text_hash, count), fisher)


class _Gates:
    """Adds an adapter's module, at `_STRENGTH`, to the output of a linear layer, and sums the squared gradients of its
    ranks' gates, ``∂L/∂z_i(t) = (b_i · ∂L/∂y_t)(a_i · x_t)``, over all tokens."""

    def __init__(self, key: ModuleKey, module: LadderModule, device: torch.device) -> None:
        self.key = key
        self._a, self._b_t = module.a.to(device), module.b_t.to(device)
        self.squares = torch.zeros(len(module.a), dtype=torch.float64, device=device)

    def forward(self, _layer: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook; ``inputs`` and ``output`` are [1, T, in] and [1, T, out]."""
        shrunk = inputs[0] @ self._a.T
        adapted: Any = output + _STRENGTH * (shrunk @ self._b_t)
        adapted.register_hook(self._backward(shrunk.detach()))
        return cast(Tensor, adapted)

    def _backward(self, shrunk: Tensor) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            self.squares += (gradient @ self._b_t.T * shrunk).square().sum((0, 1)).double()

        return add

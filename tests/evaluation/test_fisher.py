"""The sensitivity of the loss, beside the definition: gates as inputs of the model, differentiated by PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from chunkwise.evaluation.calibration_text import CalibrationText, Window
from chunkwise.evaluation.fisher import MissingTransformers, measure_sensitivity
from chunkwise.model.spec import load_spec
from chunkwise_adapters.format import LoraWeights, load_adapter
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.whitening import Calibration
from conftest import TinyWorld

TEXT = CalibrationText((Window(tuple(range(20))), Window(tuple(range(40, 52)), 9), Window((7,))), "hash")


@pytest.fixture(scope="module")
def weights(tiny: TinyWorld) -> LoraWeights:
    return load_adapter(tiny.adapters["a16"], "a16", load_spec(tiny.model).target_shapes())


def gradients_of_gates(model_dir: Path, weights: LoraWeights, layer: int, target: str) -> torch.Tensor:
    """Mean over the tokens of the squared gradients of z [T, R], all other modules at half strength without gates."""
    model: Any = LlamaForCausalLM.from_pretrained(model_dir).eval()
    with torch.no_grad():
        for (at, name), pair in weights.modules.items():
            if (at, name) != (layer, target):
                part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                linear = model.get_submodule(f"model.layers.{at}.{part}.{name}")
                linear.weight += 0.5 * pair.scale * (pair.b @ pair.a)
    module = build_ladder(weights).modules[layer, target]
    part = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    z = torch.empty(0)

    def gated(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + (z * (inputs[0] @ module.a.T)) @ module.b_t

    model.get_submodule(f"model.layers.{layer}.{part}.{target}").register_forward_hook(gated)
    total, tokens = torch.zeros(len(module.a)), 0
    for ids, first in TEXT.windows[:2]:
        z = torch.full((1, len(ids), len(module.a)), 0.5, requires_grad=True)
        logits = model(torch.tensor([ids])).logits[0]
        loss = cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:]), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, z)
        total += gradient[0].square().sum(0)
        tokens += len(ids)
    return total / tokens


@pytest.mark.parametrize(("layer", "target"), [(0, "q_proj"), (1, "v_proj"), (2, "up_proj"), (3, "down_proj")])
def test_it_is_the_mean_squared_gradient_of_every_rank_s_gates(
    tiny: TinyWorld, weights: LoraWeights, layer: int, target: str
) -> None:
    measured = measure_sensitivity(tiny.model, weights, TEXT)
    expected = gradients_of_gates(tiny.model, weights, layer, target)
    torch.testing.assert_close(measured.fisher[layer, target].float(), expected, rtol=1e-3, atol=1e-9)
    assert measured.calibration == Calibration("hash", 32)


def test_the_ladder_gives_rank_where_the_loss_is_sensitive(tiny: TinyWorld, weights: LoraWeights) -> None:
    measured = measure_sensitivity(tiny.model, weights, TEXT)
    ladder = build_ladder(weights, allocation="global", fitted=measured)
    assert (ladder.kind, ladder.calibration) == ("sensitive", Calibration("hash", 32))
    assert ladder.active_ranks != build_ladder(weights, allocation="global").active_ranks


def test_without_transformers_the_remedy_is_named(
    tiny: TinyWorld, weights: LoraWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingTransformers, match=r"pip install 'chunkwise\[eval\]', or choose --kind plain"):
        measure_sensitivity(tiny.model, weights, TEXT)

"""Moments, and the ladder's guarantee, against PEFT: an independent model that shows its modules' inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from chunkwise.evaluation.calibration_text import CalibrationText, Window
from chunkwise.evaluation.moments import collect_moments
from chunkwise.model.spec import load_spec
from chunkwise_adapters.format import LoraWeights, ModuleKey, load_adapter
from chunkwise_adapters.ladder import Allocation, build_ladder
from chunkwise_adapters.whitening import Calibration, ShrinkMoments
from conftest import TinyWorld

WINDOWS = tuple(tuple((7 * n + i * i) % 256 for i in range(length)) for n, length in enumerate((40, 33, 1, 40, 17)))
TEXT = CalibrationText(tuple(map(Window, WINDOWS)), "hash of the text")


def peft_inputs(model_dir: Path, adapter: Path) -> dict[ModuleKey, Tensor]:
    """x [tokens, in] of every adapted module over all windows, in fp64."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), adapter).eval()
    seen: dict[ModuleKey, list[Tensor]] = {}

    def keep(key: ModuleKey) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen.setdefault(key, []).append(args[0][0].double())

    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            parts = name.split(".")
            module.register_forward_pre_hook(keep((int(parts[parts.index("layers") + 1]), parts[-3])))
    with torch.inference_mode():
        for window in WINDOWS:
            model(torch.tensor([window]))
    return {key: torch.cat(inputs) for key, inputs in seen.items()}


@pytest.fixture(scope="module")
def weights(tiny: TinyWorld) -> LoraWeights:
    return load_adapter(tiny.adapters["a8"], "a8", load_spec(tiny.model).target_shapes())


@pytest.fixture(scope="module")
def moments(tiny: TinyWorld, weights: LoraWeights) -> ShrinkMoments:
    return collect_moments(tiny.model, weights, TEXT, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs(tiny: TinyWorld) -> dict[ModuleKey, Tensor]:
    return peft_inputs(tiny.model, tiny.adapters["a8"])


def test_moments_are_those_of_the_adapted_model(
    weights: LoraWeights, moments: ShrinkMoments, inputs: dict[ModuleKey, Tensor]
) -> None:
    assert moments.adapter_hash == weights.content_hash
    assert moments.calibration == Calibration("hash of the text", sum(map(len, WINDOWS)))
    assert set(moments.second) == set(weights.modules)
    for key, second in moments.second.items():
        h = inputs[key] @ weights.modules[key].a.double().T
        expected = h.T @ h / len(h)
        torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5 * float(expected.diagonal().max()))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_measured_output_error_is_the_predicted_one(
    weights: LoraWeights, moments: ShrinkMoments, inputs: dict[ModuleKey, Tensor], allocation: Allocation
) -> None:
    """The guarantee of the whitened ladder, module by module and rung by rung, on what PEFT's modules were given."""
    ladder = build_ladder(weights, allocation=allocation, fitted=moments)
    for i in range(len(ladder.rungs)):
        measured = 0.0
        for key, pair in weights.modules.items():
            module, k = ladder.modules[key], ladder.active_ranks[key][i]
            whole = pair.scale * (pair.b.double() @ pair.a.double())
            lost = whole - module.b_t[:k].double().T @ module.a[:k].double()
            error = float((inputs[key] @ lost.T).square().sum(dim=1).mean())
            predicted = module.singular_values.double().square()
            assert error == pytest.approx(float(predicted[k:].sum()), rel=1e-3, abs=1e-5 * float(predicted.sum()))
            measured += error
        assert measured == pytest.approx(ladder.truncation_errors[i], rel=1e-3, abs=1e-5 * ladder.truncation_errors[0])


def test_an_adapter_of_few_modules(tiny: TinyWorld, weights: LoraWeights) -> None:
    some = LoraWeights("some", "hash", {key: pair for key, pair in weights.modules.items() if key[1] == "v_proj"})
    moments = collect_moments(tiny.model, some, TEXT, torch.float32, torch.device("cpu"))
    assert set(moments.second) == set(some.modules)
    assert all(bool((second.diagonal() > 0).all()) for second in moments.second.values())

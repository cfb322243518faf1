"""Made adapters are valid, different, repeatable, and near the adapter they come from."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from chunkwise.bench.adapters import NOISE, WEIGHTS, make_adapters
from chunkwise.model.spec import load_spec
from chunkwise_adapters.format import load_adapter
from conftest import TinyWorld


def test_given_ones_come_first_and_the_rest_is_made(tiny: TinyWorld, tmp_path: Path) -> None:
    given = list(tiny.adapters.values())[:2]
    made = make_adapters(given, 5, tmp_path)
    assert made[:2] == given
    assert make_adapters(given, 1, tmp_path) == given[:1]
    shapes = load_spec(tiny.model).target_shapes()
    hashes = {load_adapter(path, path.name, shapes).content_hash for path in made}
    assert len(hashes) == 5


def test_peft_reads_a_made_adapter(tiny: TinyWorld, tmp_path: Path) -> None:
    _, made = make_adapters([next(iter(tiny.adapters.values()))], 2, tmp_path)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.model), str(made)).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        adapted = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    assert torch.isfinite(adapted).all()
    assert not torch.allclose(adapted, base)


def test_noise_is_small_repeatable_and_keeps_type_and_shape(tiny: TinyWorld, tmp_path: Path) -> None:
    source = next(iter(tiny.adapters.values()))
    first = load_file(make_adapters([source], 2, tmp_path / "a")[1] / WEIGHTS)
    second = load_file(make_adapters([source], 2, tmp_path / "b")[1] / WEIGHTS)
    for name, original in load_file(source / WEIGHTS).items():
        assert first[name].dtype == original.dtype
        assert torch.equal(first[name], second[name])
        moved = (first[name] - original).std() / original.std()
        assert 0.5 * NOISE < moved < 2 * NOISE

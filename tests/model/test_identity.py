"""The identity of a base model follows its weights, not its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chunkwise.core import UnsupportedModel
from chunkwise.model.identity import base_hash
from conftest import TinyWorld


@pytest.fixture
def copy(tiny: TinyWorld, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.model, tmp_path / "copy"))


def rewrite_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_a_copy_in_two_files_and_a_wider_type_is_the_same_model(tiny: TinyWorld, copy: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in load_file(copy / "model.safetensors").items()}
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, copy / f"part-{i}.safetensors")
    rewrite_config(copy, torch_dtype="float64", dtype="float64", max_position_embeddings=1024)
    assert base_hash(copy) == base_hash(tiny.model)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"],
)
def test_training_one_matrix_makes_another_model(tiny: TinyWorld, copy: Path, name: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = tensors[name] + 1e-6 * torch.randn_like(tensors[name])
    save_file(tensors, copy / "model.safetensors")
    assert base_hash(copy) != base_hash(tiny.model)


def test_another_way_to_compute_with_the_same_weights_is_another_model(tiny: TinyWorld, copy: Path) -> None:
    rewrite_config(copy, rope_theta=5e5)
    assert base_hash(copy) != base_hash(tiny.model)


def test_a_directory_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"no \.safetensors file"):
        base_hash(copy)

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from chunkwise_adapters.format import BrokenAdapter, LoraWeights, ModuleKey, UnsupportedAdapter, load_adapter

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
Tensors = dict[str, Tensor]
Load = Callable[..., LoraWeights]


@pytest.fixture
def load(write_adapter: Callable[..., Path], shapes: dict[ModuleKey, tuple[int, int]]) -> Load:
    def write_and_load(tensors: Tensors, **options: Any) -> LoraWeights:
        return load_adapter(write_adapter(tensors, **options), "a", shapes)

    return write_and_load


def test_factors_trained_rank_and_scale_are_kept_apart(load: Load, adapter_tensors: Tensors) -> None:
    weights = load(adapter_tensors)
    pair = weights.modules[0, "q_proj"]
    assert list(weights.modules) == [(0, "q_proj"), (1, "down_proj")]
    assert (weights.name, weights.trained_rank, pair.trained_rank, pair.scale) == ("a", 4, 4, 2.0)
    assert torch.equal(pair.a, adapter_tensors[Q_A]) and torch.equal(pair.b, adapter_tensors[Q_B])


def test_trained_rank_is_the_largest_of_the_modules(load: Load, adapter_tensors: Tensors) -> None:
    tensors = adapter_tensors | {Q_A: torch.randn(6, 48), Q_B: torch.randn(48, 6)}
    weights = load(tensors, rank_pattern={"q_proj": 6}, alpha_pattern={"down_proj": 2})
    assert weights.trained_rank == 6
    assert {key: (pair.trained_rank, pair.scale) for key, pair in weights.modules.items()} == {
        (0, "q_proj"): (6, 8 / 6),
        (1, "down_proj"): (4, 0.5),
    }


@pytest.mark.parametrize(("old", "new"), [(".weight", ".default.weight"), ("model.model.layers", "model.layers")])
def test_other_spellings_of_tensor_names(load: Load, adapter_tensors: Tensors, old: str, new: str) -> None:
    weights = load({name.replace(old, new): tensor for name, tensor in adapter_tensors.items()})
    assert torch.equal(weights.modules[0, "q_proj"].a, adapter_tensors[Q_A])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_become_fp32(load: Load, adapter_tensors: Tensors, dtype: torch.dtype) -> None:
    weights = load({name: tensor.to(dtype) for name, tensor in adapter_tensors.items()})
    assert torch.equal(weights.modules[0, "q_proj"].a, adapter_tensors[Q_A].to(dtype).float())


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
        "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight",
        "base_model.model.model.norm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_tensors_of_no_supported_module_are_refused_by_name(load: Load, adapter_tensors: Tensors, name: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=name):
        load(adapter_tensors | {name: torch.zeros(4, 48)})


def test_many_unknown_tensors_are_counted(load: Load, adapter_tensors: Tensors) -> None:
    with pytest.raises(UnsupportedAdapter, match=r"h\.0, h\.1, h\.2, h\.3, h\.4 and 4 more"):
        load(adapter_tensors | {f"h.{i}": torch.zeros(1) for i in range(9)})


def test_adapter_of_nothing_is_refused(load: Load) -> None:
    with pytest.raises(UnsupportedAdapter, match="no tensors"):
        load({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q_A: torch.full((4, 48), float("nan"))}, "NaN or infinite"),
        ({Q_B: torch.full((48, 4), float("-inf"))}, "NaN or infinite"),
        ({Q_A: torch.full((4, 48), 1e300, dtype=torch.float64)}, "NaN or infinite"),
        ({Q_A: torch.ones(4, 48, dtype=torch.int8)}, "int8"),
        ({Q_A: torch.randn(48)}, r"\(48,\) and B \(48, 4\)"),
        ({Q_A: torch.randn(5, 48)}, r"\(5, 48\) and B \(48, 4\)"),
        ({Q_A: torch.randn(5, 48), Q_B: torch.randn(48, 5)}, "rank 5, but adapter_config.json says 4"),
        ({Q_A: torch.randn(4, 47)}, r"\(48, 47\) \(out, in\), the base model has shape \(48, 48\)"),
        ({Q_B: torch.randn(52, 4)}, r"\(52, 48\) \(out, in\), the base model has shape \(48, 48\)"),
        ({Q_A.replace("lora_A", "lora_A.default"): torch.randn(4, 48)}, "given twice"),
        ({Q_A.replace("model.model.l", "model.l"): torch.randn(4, 48)}, "given twice"),
    ],
)
def test_inconsistent_tensors_are_broken(load: Load, adapter_tensors: Tensors, changes: Tensors, message: str) -> None:
    with pytest.raises(BrokenAdapter, match=message):
        load(adapter_tensors | changes)


def test_layer_that_the_base_lacks_is_named_with_its_shape(load: Load, adapter_tensors: Tensors) -> None:
    tensors = {name.replace("layers.1", "layers.7"): tensor for name, tensor in adapter_tensors.items()}
    with pytest.raises(BrokenAdapter, match=r"layer 7 down_proj.*\(48, 64\).*no such module"):
        load(tensors)


@pytest.mark.parametrize(("missing", "partner"), [(Q_A, "lora_A"), (Q_B, "lora_B")])
def test_missing_half_is_named(load: Load, adapter_tensors: Tensors, missing: str, partner: str) -> None:
    del adapter_tensors[missing]
    with pytest.raises(BrokenAdapter, match=rf"q_proj.*no partner {partner}"):
        load(adapter_tensors)


class TestContentHash:
    @pytest.fixture
    def digest(
        self, write_adapter: Callable[..., Path], shapes: dict[ModuleKey, tuple[int, int]]
    ) -> Callable[..., str]:
        count = iter(range(100))

        def write_and_hash(tensors: Tensors, **options: Any) -> str:
            root = write_adapter(tensors, directory=f"adapter-{next(count)}", **options)
            return load_adapter(root, "a", shapes).content_hash

        return write_and_hash

    def test_a_copy_under_another_name_has_the_same_hash(
        self, write_adapter: Callable[..., Path], adapter_tensors: Tensors, shapes: dict[ModuleKey, tuple[int, int]]
    ) -> None:
        root = write_adapter(adapter_tensors)
        copy = root.parent / "copy"
        shutil.copytree(root, copy)
        assert load_adapter(copy, "b", shapes).content_hash == load_adapter(root, "a", shapes).content_hash

    def test_spelling_of_the_files_does_not_count(
        self, write_adapter: Callable[..., Path], adapter_tensors: Tensors, shapes: dict[ModuleKey, tuple[int, int]]
    ) -> None:
        root = write_adapter(adapter_tensors)
        before = load_adapter(root, "a", shapes).content_hash
        config = json.loads((root / "adapter_config.json").read_text()) | {"lora_dropout": 0.1, "lora_alpha": 8.0}
        (root / "adapter_config.json").write_text(json.dumps(config, indent=4, sort_keys=True))
        save_file(
            dict(reversed(adapter_tensors.items())), root / "adapter_model.safetensors", metadata={"format": "pt"}
        )
        assert load_adapter(root, "a", shapes).content_hash == before

    @pytest.mark.parametrize("name", [Q_A, Q_B])
    @pytest.mark.parametrize(("row", "bit"), [(0, 0), (3, 22), (2, 31)])
    def test_one_flipped_bit_counts(
        self, digest: Callable[..., str], adapter_tensors: Tensors, name: str, row: int, bit: int
    ) -> None:
        before = digest(adapter_tensors)
        adapter_tensors[name][row].view(torch.int32)[1] ^= -(2**31) if bit == 31 else 1 << bit
        assert digest(adapter_tensors) != before

    @pytest.mark.parametrize("options", [{"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 4}}])
    def test_scale_counts(self, digest: Callable[..., str], adapter_tensors: Tensors, options: dict[str, Any]) -> None:
        assert digest(adapter_tensors, **options) != digest(adapter_tensors)

    def test_type_counts(self, digest: Callable[..., str], adapter_tensors: Tensors) -> None:
        rounded = {name: tensor.bfloat16() for name, tensor in adapter_tensors.items()}
        same_bytes = {name: tensor.view(torch.float16) for name, tensor in rounded.items()}
        assert digest(rounded) != digest(same_bytes)

    def test_the_module_counts(self, digest: Callable[..., str], adapter_tensors: Tensors) -> None:
        moved = {name.replace("q_proj", "o_proj"): tensor for name, tensor in adapter_tensors.items()}
        assert digest(moved) != digest(adapter_tensors)

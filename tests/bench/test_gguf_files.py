"""What the GGUF writers write, read back with gguf's own reader and turned back by an independent formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from chunkwise.bench.gguf_files import NotConvertible, to_gguf_rows, write_adapter, write_base
from chunkwise.model.spec import load_spec
from chunkwise_adapters.format import load_adapter
from conftest import TinyWorld
from tiny import make_adapter, make_model


def tensors(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}


def from_gguf_rows(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows 0, 2, 4, … of a head are its first half, rows 1, 3, 5, … its second."""
    dim = weight.shape[0] // heads
    order = [head * dim + row for head in range(heads) for row in (*range(0, dim, 2), *range(1, dim, 2))]
    return weight[order]


def test_rotating_neighbours_after_reordering_equals_rotating_halves() -> None:
    """GGUF's layout rotates rows 2i and 2i + 1 together. With the rows reordered, attention scores must not change."""
    heads, dim, width = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * dim, width, generator=generator, dtype=torch.float64) for _ in "qk")
    x, y = torch.randn(2, width, generator=generator, dtype=torch.float64)
    angles = torch.arange(1, dim // 2 + 1) * 0.3
    cos, sin = (f(torch.cat([angles, angles])).double().view(1, 1, dim) for f in (torch.cos, torch.sin))
    halves = apply_rotary_pos_emb(  # type: ignore[no-untyped-call]
        (q @ x).view(1, heads, 1, dim), (k @ y).view(1, heads, 1, dim), cos, sin
    )
    expected = (halves[0] * halves[1]).sum(-1).flatten()

    def rotate_neighbours(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        pairs = vector.reshape(heads, dim // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles.double().numpy())
        return np.stack([turned.real, turned.imag], -1).reshape(heads, dim)

    left = rotate_neighbours(to_gguf_rows(q.numpy(), heads) @ x.numpy())
    right = rotate_neighbours(to_gguf_rows(k.numpy(), heads) @ y.numpy())
    np.testing.assert_allclose((left * right).sum(-1), expected.numpy())


def test_a_base_comes_back_exactly(tiny: TinyWorld, tmp_path: Path) -> None:
    write_base(tiny.model, tmp_path / "base.gguf", "F32")
    written = tensors(tmp_path / "base.gguf")
    original = {name: t.float().numpy() for name, t in load_file(tiny.model / "model.safetensors").items()}
    spec = load_spec(tiny.model)
    np.testing.assert_array_equal(written["token_embd.weight"], original["model.embed_tokens.weight"])
    layer = "model.layers.1.self_attn"
    q = from_gguf_rows(written["blk.1.attn_q.weight"], spec.heads)
    k = from_gguf_rows(written["blk.1.attn_k.weight"], spec.kv_heads)
    np.testing.assert_array_equal(q, original[f"{layer}.q_proj.weight"])
    np.testing.assert_array_equal(k, original[f"{layer}.k_proj.weight"])
    np.testing.assert_array_equal(written["blk.1.attn_v.weight"], original[f"{layer}.v_proj.weight"])
    np.testing.assert_array_equal(written["blk.3.ffn_down.weight"], original["model.layers.3.mlp.down_proj.weight"])
    assert len(written) == len(original)
    fields = GGUFReader(tmp_path / "base.gguf").fields
    assert fields["llama.attention.head_count_kv"].contents() == spec.kv_heads
    assert fields["llama.rope.freq_base"].contents() == spec.rope_theta


@pytest.mark.parametrize(("kind", "steps"), [("Q8_0", 127), ("Q4_0", 8)])
def test_a_quantised_base_is_near(tmp_path: Path, kind: str, steps: int) -> None:
    """Both take rows in blocks of 32, so the widths must be multiples of that."""
    make_model(
        tmp_path, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2, head_dim=32
    )
    write_base(tmp_path, tmp_path / "small.gguf", kind)
    write_base(tmp_path, tmp_path / "f32.gguf", "F32")
    near, exact = tensors(tmp_path / "small.gguf"), tensors(tmp_path / "f32.gguf")
    assert near.keys() == exact.keys()
    for name, values in exact.items():
        assert np.abs(near[name] - values).max() <= np.abs(values).max() / (steps if name.startswith("blk.") else 127)
    assert np.array_equal(near["output_norm.weight"], exact["output_norm.weight"])


def test_an_adapter_comes_back_exactly_with_its_scale(tiny: TinyWorld, tmp_path: Path) -> None:
    source = next(iter(tiny.adapters.values()))
    write_adapter(source, tiny.model, tmp_path / "a.gguf")
    spec = load_spec(tiny.model)
    written = tensors(tmp_path / "a.gguf")
    pairs = load_adapter(source, "a", spec.target_shapes()).modules
    assert len(written) == 2 * len(pairs)
    pair = pairs[(2, "q_proj")]
    np.testing.assert_array_equal(written["blk.2.attn_q.weight.lora_a"], pair.a.numpy())
    b = from_gguf_rows(written["blk.2.attn_q.weight.lora_b"], spec.heads)
    np.testing.assert_array_equal(b, pair.b.numpy())
    alpha = GGUFReader(tmp_path / "a.gguf").fields["adapter.lora.alpha"].contents()
    assert alpha / pair.trained_rank == pytest.approx(pair.scale)


def test_adapters_of_several_alphas_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    make_adapter(model, tmp_path / "a", 4, 0, alpha_pattern={"q_proj": 3})
    with pytest.raises(NotConvertible, match=r"alphas \[3"):
        write_adapter(tmp_path / "a", tmp_path / "model", tmp_path / "a.gguf")


def test_scaled_rotary_positions_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(NotConvertible, match="rope_scaling"):
        write_base(tmp_path, tmp_path / "base.gguf", "F32")

"""Matrices kept in bf16: what is computed, and that nothing but the memory changes where they were bf16 already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chunkwise.config.settings import Quantize, ShardSettings
from chunkwise.model.linear import FOUR_BITS
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import SingleProcess
from chunkwise.shard.process import _types
from conftest import TinyWorld
from ragged import Part, Rig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rounded(tiny: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with every weight rounded to bf16, in fp32."""
    directory = tmp_path_factory.mktemp("rounded")
    for file in tiny.model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (weights,) = directory.glob("*.safetensors")
    save_file({name: t.bfloat16().float() for name, t in load_file(weights).items()}, weights)
    return directory


def _logits(model_dir: Path, storage: torch.dtype | None, threads: int | None) -> torch.Tensor:
    rig = Rig(model_dir, threads)
    rig.model = Llama(model_dir, SingleProcess(), torch.float32, CPU, storage=storage, kernel_threads=threads)
    return torch.cat([rig.run([Part(rig.line(n), 0, n)]).logits for n in (1, 3, 21)])


def test_bf16_that_was_bf16_gives_the_same_bits(rounded: Path) -> None:
    assert torch.equal(_logits(rounded, torch.bfloat16, 1), _logits(rounded, None, 1))


def test_bf16_agrees_with_torch_operations(tiny: TinyWorld) -> None:
    kernels, plain = (_logits(tiny.model, torch.bfloat16, threads) for threads in (2, None))
    torch.testing.assert_close(kernels, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(kernels, _logits(tiny.model, None, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "quantize", "checkpoint", "expected"),
    [
        (None, None, "float32", (torch.float32, torch.float32)),
        (None, None, "bfloat16", (torch.float32, torch.bfloat16)),
        (None, None, "float16", (torch.float32, torch.float32)),
        ("float32", None, "bfloat16", (torch.float32, torch.float32)),
        ("bfloat16", None, "float32", (torch.float32, torch.bfloat16)),
        ("float16", None, "bfloat16", (torch.float16, torch.float16)),
        (None, "int8", "bfloat16", (torch.float32, torch.int8)),
        (None, "int4", "bfloat16", (torch.float32, FOUR_BITS)),
    ],
)
def test_types_on_a_cpu(
    asked: str | None, quantize: Quantize | None, checkpoint: str, expected: tuple[torch.dtype, ...]
) -> None:
    settings = ShardSettings("model", ("unix:///s",), dtype=asked, quantize=quantize)
    assert _types(settings, CPU, checkpoint) == expected

"""As many different adapters as a scenario needs, out of a few given ones: PEFT directories that every engine reads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NOISE = 0.1


def make_adapters(given: Sequence[Path], count: int, directory: Path) -> list[Path]:
    """``count`` PEFT directories: the given ones, then copies of them in turn with seeded noise, under ``directory``.

    Each factor gets normal noise of `NOISE` times its own standard deviation, in its own type, so that rank, size and
    scale stay those of a trained adapter while no two are equal. What is there already is used again.
    """
    made = list(given[:count])
    for index in range(len(made), count):
        source = given[index % len(given)]
        target = directory / f"{source.name}-noise{index}"
        if not (target / WEIGHTS).exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / CONFIG, target / CONFIG)
            generator = torch.Generator().manual_seed(index)
            tensors = load_file(source / WEIGHTS)
            noisy = {name: _with_noise(tensor, generator) for name, tensor in sorted(tensors.items())}
            save_file(noisy, target / WEIGHTS, metadata={"format": "pt"})
        made.append(target)
    return made


def _with_noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    values = tensor.float()
    noise = torch.randn(values.shape, generator=generator)
    return (values + NOISE * values.std() * noise).to(tensor.dtype).contiguous()

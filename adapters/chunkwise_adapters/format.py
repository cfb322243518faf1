"""A PEFT directory becomes `LoraWeights`: factors in fp32, trained rank and scale kept apart, everything validated.

It knows PEFT's files and tensor names. It does not know ladders, devices or how an adapter is applied, and never reads
pickle files. All errors of the package are re-exported here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chunkwise_adapters.directory import CONFIG_FILE, WEIGHTS_FILE, open_directory, read_config, read_tensors
from chunkwise_adapters.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNotFound,
    BrokenAdapter,
    InvalidRung,
    UnsupportedAdapter,
)
from chunkwise_adapters.options import LoraOptions, parse_options

__all__ = [
    "TARGETS",
    "AdapterConflict",
    "AdapterError",
    "AdapterNotFound",
    "BrokenAdapter",
    "InvalidRung",
    "LoraPair",
    "LoraWeights",
    "ModuleKey",
    "UnsupportedAdapter",
    "load_adapter",
]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a LLaMA block that can carry an adapter, in the order of the forward pass."""

ModuleKey = tuple[int, str]
"""(layer, target): layer counts from 0, target is one of `TARGETS`."""

_TENSOR_NAME = re.compile(
    r"base_model\.model\."
    r"(?P<path>(?:model\.)?layers\.(?P<layer>0|[1-9][0-9]*)\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj))"
    r"\.lora_(?P<half>[AB])(?:\.default)?\.weight"
)
_KEYS_NAMED = 5


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """One module's factors as trained: ``ΔW = scale · b @ a`` with ``a`` [trained_rank, in] and ``b``
    [out, trained_rank], both fp32. ``scale`` (alpha/r, or alpha/√r for rsLoRA) is not folded into either."""

    a: Tensor
    b: Tensor
    trained_rank: int
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """A validated adapter.

    ``content_hash`` is the SHA-256 (hex) of all that determines what it computes: the tensors' names, types, shapes and
    bytes and each module's rank and scale. The directory's name and place are not part of it.
    """

    name: str
    content_hash: str
    modules: dict[ModuleKey, LoraPair]

    @property
    def trained_rank(self) -> int:
        """The largest trained rank of any module."""
        return max(pair.trained_rank for pair in self.modules.values())


@dataclass(frozen=True, slots=True)
class _TensorName:
    """A parsed tensor name: ``path`` is the module's dotted name in the base model, ``half`` is "A" or "B"."""

    path: str
    key: ModuleKey
    half: str


def load_adapter(path: Path, name: str, shapes: Mapping[ModuleKey, tuple[int, int]]) -> LoraWeights:
    """Read the PEFT directory ``path`` as the adapter ``name`` of a base model with modules of ``shapes`` (out, in).

    Raises:
        AdapterNotFound: no directory at ``path``, or no adapter_config.json in it.
        UnsupportedAdapter: options, tensors or file formats beyond plain LoRA in safetensors; or no module is adapted.
        BrokenAdapter: unreadable or malformed files, files outside the directory, missing halves, shapes that do not
            fit the configuration or the base model, NaN or infinite weights.
    """
    root = open_directory(path, name)
    options = parse_options(read_config(root, name), name)
    tensors = read_tensors(root, name)
    halves = _group(tensors, name)
    modules = {
        key: _pair(key, module_path, (tensors[a_name], tensors[b_name]), options, name)
        for key, (module_path, a_name, b_name) in sorted(halves.items())
    }
    for key, pair in modules.items():
        _check_base(key, pair, shapes, name)
    return LoraWeights(name, _content_hash(tensors, modules), modules)


def _parse_name(tensor_name: str) -> _TensorName | None:
    match = _TENSOR_NAME.fullmatch(tensor_name)
    if match is None:
        return None
    path = match["path"]
    return _TensorName(path, (int(match["layer"]), path.rpartition(".")[2]), match["half"])


def _named(keys: list[str]) -> str:
    rest = len(keys) - _KEYS_NAMED
    return ", ".join(keys[:_KEYS_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _group(tensors: Mapping[str, Tensor], name: str) -> dict[ModuleKey, tuple[str, str, str]]:
    """Per module: its path in the base model and the names of its A and B tensors."""
    parsed = {tensor_name: _parse_name(tensor_name) for tensor_name in sorted(tensors)}
    unknown = [tensor_name for tensor_name, parts in parsed.items() if parts is None]
    if unknown:
        raise UnsupportedAdapter(
            f"adapter {name!r}: tensors that belong to no supported module: {_named(unknown)}; supported are "
            f"lora_A and lora_B of {', '.join(TARGETS)} in model.layers"
        )
    if not parsed:
        raise UnsupportedAdapter(f"adapter {name!r}: {WEIGHTS_FILE} holds no tensors, so the adapter adapts nothing")
    found: dict[tuple[ModuleKey, str], tuple[str, str]] = {}
    for tensor_name, parts in parsed.items():
        assert parts is not None
        other = found.setdefault((parts.key, parts.half), (parts.path, tensor_name))
        if other[1] != tensor_name:
            raise BrokenAdapter(f"adapter {name!r}: {other[1]} and {tensor_name} are the same factor, given twice")
    halves: dict[ModuleKey, tuple[str, str, str]] = {}
    for (key, half), (module_path, tensor_name) in found.items():
        partner = found.get((key, "B" if half == "A" else "A"))
        if partner is None:
            raise BrokenAdapter(f"adapter {name!r}: {tensor_name} has no partner lora_{'B' if half == 'A' else 'A'}")
        if half == "A":
            halves[key] = (module_path, tensor_name, partner[1])
    return halves


def _pair(
    key: ModuleKey, module_path: str, factors: tuple[Tensor, Tensor], options: LoraOptions, name: str
) -> LoraPair:
    a, b = factors
    rank, scale = options.rank_and_scale(module_path)
    where = f"adapter {name!r}, layer {key[0]} {key[1]}"
    if not a.is_floating_point() or not b.is_floating_point():
        raise BrokenAdapter(f"{where}: factors have types {a.dtype} and {b.dtype}; floating point is expected")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise BrokenAdapter(f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} are not (r, in) and (out, r)")
    if a.shape[0] != rank:
        raise BrokenAdapter(f"{where}: the tensors have rank {a.shape[0]}, but {CONFIG_FILE} says {rank}")
    pair = LoraPair(a.float(), b.float(), rank, scale)
    if not (bool(torch.isfinite(pair.a).all()) and bool(torch.isfinite(pair.b).all())):
        raise BrokenAdapter(f"{where}: the factors hold NaN or infinite values")
    return pair


def _check_base(key: ModuleKey, pair: LoraPair, shapes: Mapping[ModuleKey, tuple[int, int]], name: str) -> None:
    shape = (pair.b.shape[0], pair.a.shape[1])
    expected = shapes.get(key)
    if shape != expected:
        base = "has no such module" if expected is None else f"has shape {expected}"
        raise BrokenAdapter(
            f"adapter {name!r}, layer {key[0]} {key[1]}: the adapter is for shape {shape} (out, in), the base model "
            f"{base}; it was trained for another base model"
        )


def _content_hash(tensors: Mapping[str, Tensor], modules: Mapping[ModuleKey, LoraPair]) -> str:
    computed = [[*key, pair.trained_rank, pair.scale.hex()] for key, pair in modules.items()]
    digest = hashlib.sha256(json.dumps(computed).encode())
    for tensor_name in sorted(tensors):
        tensor = tensors[tensor_name]
        digest.update(json.dumps([tensor_name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()

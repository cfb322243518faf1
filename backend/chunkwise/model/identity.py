"""Which base model a checkpoint is, whatever its files are called and whatever type they are stored in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from chunkwise.model.spec import ModelSpec, load_spec
from chunkwise.model.weights import Checkpoint

_CPU = torch.device("cpu")


def base_hash(model_dir: Path) -> str:
    """SHA-256 (hex) of the dimensions and of the middle row of the embedding and of every matrix that LoRA can adapt,
    in fp32. A few hundred rows are read instead of all weights: enough to tell a base from its fine-tunes, in
    milliseconds; not a check that the files are undamaged.

    Raises:
        UnsupportedModel: the checkpoint cannot be served.
    """
    spec = load_spec(model_dir)
    # The stored type and the longest position change neither the weights nor what they compute.
    described = dataclasses.asdict(dataclasses.replace(spec, dtype="", max_position=0))
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    with Checkpoint(model_dir, torch.float32, _CPU) as checkpoint:
        for name, shape in _matrices(spec).items():
            middle = shape[0] // 2
            row = checkpoint.read(name, shape, slice(middle, middle + 1))
            digest.update(row.numpy().data)
    return digest.hexdigest()


def _matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    blocks = {target: "self_attn" if target[0] in "qkvo" else "mlp" for _, target in spec.target_shapes()}
    return {
        "model.embed_tokens.weight": (spec.vocab, spec.hidden),
        **{
            f"model.layers.{layer}.{blocks[target]}.{target}.weight": shape
            for (layer, target), shape in spec.target_shapes().items()
        },
    }

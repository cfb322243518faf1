"""The demo adapter's policy was made for the weights beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from chunkwise.config.policy import load_policy
from chunkwise_adapters.format import TARGETS, load_adapter
from chunkwise_adapters.ladder import build_ladder

DEMO = Path(__file__).parents[2] / "adapters" / "demo-squad-r8"


def test_the_demo_s_policy_is_of_its_ladder() -> None:
    shapes: dict[tuple[int, str], tuple[int, int]] = {}
    with safe_open(DEMO / "adapter_model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
        for name in names:
            parts = name.split(".")
            target = next(part for part in parts if part in TARGETS)
            out = file.get_slice(name.replace("lora_A", "lora_B")).get_shape()[0]
            shapes[int(parts[parts.index("layers") + 1]), target] = out, file.get_slice(name).get_shape()[1]
    ladder = build_ladder(load_adapter(DEMO, "demo", shapes), allocation="global")
    section = load_policy(DEMO / "policy.toml").adapters["demo"]
    assert section.content_hash == ladder.content_hash
    assert section.rungs == ladder.rungs
    assert section.kept_energy == pytest.approx(ladder.kept_energy, abs=1e-4)

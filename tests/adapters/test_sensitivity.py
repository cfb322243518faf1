"""Sensitive ladders: the plain ladder's factors, with ranks where they are worth most for their cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from chunkwise_adapters.errors import InvalidCalibration
from chunkwise_adapters.format import LoraWeights, ModuleKey
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.sensitivity import Sensitivity
from chunkwise_adapters.whitening import Calibration

RANKS: dict[ModuleKey, int] = {(0, "q_proj"): 8, (0, "v_proj"): 2, (1, "down_proj"): 8}


@pytest.fixture
def weights(make_weights: Callable[..., LoraWeights]) -> LoraWeights:
    return make_weights(rank=RANKS)


def sensitivity(weights: LoraWeights, seed: int = 0) -> Sensitivity:
    generator = torch.Generator().manual_seed(seed)
    fisher = {key: torch.rand(rank, generator=generator, dtype=torch.float64) for key, rank in RANKS.items()}
    return Sensitivity(weights.content_hash, Calibration("text", 50), fisher)


def test_factors_and_energies_are_those_of_the_plain_ladder(weights: LoraWeights) -> None:
    plain, ladder = build_ladder(weights), build_ladder(weights, fitted=sensitivity(weights))
    assert (plain.kind, ladder.kind, ladder.calibration) == ("plain", "sensitive", Calibration("text", 50))
    for key, module in plain.modules.items():
        other = ladder.modules[key]
        for name in ("a", "b_t", "singular_values"):
            assert torch.equal(getattr(other, name), getattr(module, name))


def test_rank_goes_where_it_is_worth_most_for_its_cost(weights: LoraWeights) -> None:
    measured = sensitivity(weights)
    ladder = build_ladder(weights, [0.5, 1, 2, 4], "global", measured)
    for i in range(4):
        kept, dropped = [], []
        for key, module in ladder.modules.items():
            cut, worth = ladder.active_ranks[key][i], (measured.fisher[key] / module.cost).tolist()
            # A rank is worth no more than those it needs before it.
            nested = [min(worth[: k + 1]) for k in range(len(worth))]
            kept += nested[:cut]
            dropped += nested[cut:]
        assert min(kept) >= max(dropped) - 1e-9


def test_a_module_that_matters_to_nothing_gets_rank_last(weights: LoraWeights) -> None:
    measured = sensitivity(weights)
    silent = replace(measured, fisher={**measured.fisher, (1, "down_proj"): torch.zeros(8, dtype=torch.float64)})
    ladder = build_ladder(weights, [1, 2], "global", silent)
    assert ladder.active_ranks[1, "down_proj"][0] == 0
    assert build_ladder(weights, [1], "global").active_ranks[1, "down_proj"][0] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_hash": "f" * 64}, r"content ffffffffffff, not 0-hash-of-a.*measure it again"),
        ({"calibration": Calibration("text", 0)}, "has no tokens"),
        ({"fisher": {}}, r"layer 0 q_proj: fisher None; expected is \(8,\)"),
        ({"fisher": {key: torch.zeros(3) for key in RANKS}}, r"fisher \(3,\); expected is \(8,\)"),
        ({"fisher": {key: torch.full((r,), float("nan")) for key, r in RANKS.items()}}, "NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_refused(weights: LoraWeights, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCalibration, match=message):
        build_ladder(weights, fitted=replace(sensitivity(weights), **change))

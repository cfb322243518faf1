import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkwise_adapters.format import InvalidRung, LoraPair, LoraWeights, ModuleKey
from chunkwise_adapters.ladder import Allocation, LadderModule, RankLadder, build_ladder

MIXED_RANKS: dict[ModuleKey, int] = {(0, "q_proj"): 16, (0, "v_proj"): 4, (1, "down_proj"): 32, (1, "up_proj"): 7}
BOTH: tuple[Allocation, ...] = ("uniform", "global")


def delta(pair: LoraPair) -> Tensor:
    return pair.scale * (pair.b.double() @ pair.a.double())


def prefix(module: LadderModule, k: int) -> Tensor:
    return module.b_t[:k].double().T @ module.a[:k].double()


@st.composite
def pairs(draw: st.DrawFn) -> LoraPair:
    out, inp, rank = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a = torch.randn(rank, inp, generator=generator)
    if draw(st.booleans()):
        a[-1] = a[0]
    scale = draw(st.sampled_from([0.25, 1.0, 3.0, -1.0]))
    return LoraPair(a, torch.randn(out, rank, generator=generator), rank, scale)


def ladder_of(pair: LoraPair) -> tuple[RankLadder, LadderModule]:
    ladder = build_ladder(LoraWeights("a", "hash", {(0, "q_proj"): pair}))
    return ladder, ladder.modules[0, "q_proj"]


@given(pair=pairs())
@settings(deadline=None)
def test_full_rank_is_the_same_update_with_the_scale_folded_in_once(pair: LoraPair) -> None:
    _, module = ladder_of(pair)
    torch.testing.assert_close(prefix(module, len(module.a)), delta(pair), rtol=0, atol=1e-5)


@given(pair=pairs())
@settings(deadline=None)
def test_every_prefix_is_the_best_approximation_of_its_rank(pair: LoraPair) -> None:
    _, module = ladder_of(pair)
    u, s, v_h = torch.linalg.svd(delta(pair), full_matrices=False)
    torch.testing.assert_close(module.singular_values.double(), s[: len(module.a)], rtol=0, atol=1e-5)
    for k in range(len(module.a) + 1):
        error = torch.linalg.matrix_norm(delta(pair) - prefix(module, k))
        best = torch.linalg.matrix_norm(delta(pair) - (u[:, :k] * s[:k]) @ v_h[:k])
        torch.testing.assert_close(error, best, rtol=0, atol=1e-5)


@given(pair=pairs())
@settings(deadline=None)
def test_factors_are_contiguous_fp32_with_orthonormal_b(pair: LoraPair) -> None:
    _, module = ladder_of(pair)
    stored_rank = min(pair.trained_rank, *delta(pair).shape)
    assert module.a.shape == (stored_rank, pair.a.shape[1]) and module.b_t.shape == (stored_rank, pair.b.shape[0])
    assert all(factor.is_contiguous() and factor.dtype == torch.float32 for factor in (module.a, module.b_t))
    torch.testing.assert_close(module.b_t @ module.b_t.T, torch.eye(stored_rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(module.a.norm(dim=1), module.singular_values, rtol=1e-5, atol=1e-5)


def test_adapter_of_zeros_loses_nothing() -> None:
    ladder, module = ladder_of(LoraPair(torch.randn(4, 8), torch.zeros(6, 4), 4, 2.0))
    assert ladder.kept_energy == (1.0,) * len(ladder.rungs)
    assert not prefix(module, 4).any()


@pytest.mark.parametrize(
    ("rank", "rungs"),
    [(32, (0, 1, 2, 4, 8, 16, 32)), (12, (0, 1, 2, 4, 8, 12)), (2, (0, 1, 2)), (1, (0, 1))],
)
def test_default_rungs_are_powers_of_two_and_the_trained_rank(
    make_weights: Callable[..., LoraWeights], rank: int, rungs: tuple[int, ...]
) -> None:
    assert build_ladder(make_weights(rank=rank)).rungs == rungs


def test_given_rungs_are_sorted_and_end_with_the_trained_rank(make_weights: Callable[..., LoraWeights]) -> None:
    assert build_ladder(make_weights(rank=16), rungs=[8, 0, 8, 3]).rungs == (0, 3, 8, 16)
    assert build_ladder(make_weights(rank=16), rungs=[]).rungs == (16,)


@pytest.mark.parametrize("rung", [-1, 17])
def test_impossible_rungs_are_refused(make_weights: Callable[..., LoraWeights], rung: int) -> None:
    with pytest.raises(InvalidRung, match=rf"{rung}.*0\.\.16"):
        build_ladder(make_weights(rank=16), rungs=[4, rung])


def test_rung_index(make_weights: Callable[..., LoraWeights]) -> None:
    ladder = build_ladder(make_weights(rank=12))
    assert [ladder.rung_index(rung) for rung in ladder.rungs] == list(range(6))
    assert ladder.rung_index(None) == 5
    with pytest.raises(InvalidRung, match=r"no rung 3; its rungs are \(0, 1, 2, 4, 8, 12\)"):
        ladder.rung_index(3)


@pytest.mark.parametrize("allocation", BOTH)
def test_rungs_are_nested_and_spend_the_uniform_total(
    make_weights: Callable[..., LoraWeights], allocation: Allocation
) -> None:
    ladder = build_ladder(make_weights(rank=MIXED_RANKS), allocation=allocation)
    for key, ranks in ladder.active_ranks.items():
        assert all(before <= after for before, after in itertools.pairwise(ranks))
        assert ranks[-1] == len(ladder.modules[key].a) == MIXED_RANKS[key]
    for i, rung in enumerate(ladder.rungs):
        total = sum(min(rung, rank) for rank in MIXED_RANKS.values())
        assert sum(ranks[i] for ranks in ladder.active_ranks.values()) == total
        assert ladder.mean_active_rank[i] == pytest.approx(total / len(MIXED_RANKS))


def test_uniform_gives_every_module_the_budget_up_to_its_rank(make_weights: Callable[..., LoraWeights]) -> None:
    ladder = build_ladder(make_weights(rank=MIXED_RANKS))
    assert ladder.active_ranks[0, "v_proj"] == (0, 1, 2, 4, 4, 4, 4)
    assert ladder.active_ranks[1, "up_proj"] == (0, 1, 2, 4, 7, 7, 7)


def test_global_keeps_the_largest_singular_values_of_all_modules(make_weights: Callable[..., LoraWeights]) -> None:
    ladder = build_ladder(make_weights(rank=MIXED_RANKS), allocation="global")
    for i in range(len(ladder.rungs)):
        cut = {key: ranks[i] for key, ranks in ladder.active_ranks.items()}
        kept = [float(s) for key, k in cut.items() for s in ladder.modules[key].singular_values[:k]]
        dropped = [float(s) for key, k in cut.items() for s in ladder.modules[key].singular_values[k:]]
        assert min(kept, default=float("inf")) >= max(dropped, default=0.0)


def test_global_splits_ties_as_uniform_does() -> None:
    pair = LoraPair(torch.eye(8, 10), torch.eye(9, 8), 8, 1.0)
    weights = LoraWeights("a", "hash", {(layer, "q_proj"): pair for layer in range(5)})
    assert build_ladder(weights, allocation="global").active_ranks == build_ladder(weights).active_ranks


@pytest.mark.parametrize("allocation", BOTH)
def test_kept_energy_is_the_share_of_the_squared_norm(
    make_weights: Callable[..., LoraWeights], allocation: Allocation
) -> None:
    weights = make_weights(rank=MIXED_RANKS)
    ladder = build_ladder(weights, allocation=allocation)
    total = sum(float(delta(pair).square().sum()) for pair in weights.modules.values())
    for i, kept in enumerate(ladder.kept_energy):
        lost = sum(
            float((delta(weights.modules[key]) - prefix(module, ladder.active_ranks[key][i])).square().sum())
            for key, module in ladder.modules.items()
        )
        assert kept == pytest.approx(1.0 - lost / total, abs=1e-6)


def test_global_keeps_at_least_the_energy_of_uniform(make_weights: Callable[..., LoraWeights]) -> None:
    weights = make_weights(rank=MIXED_RANKS)
    uniform, spread = build_ladder(weights), build_ladder(weights, allocation="global")
    assert all(g >= u for g, u in zip(spread.kept_energy, uniform.kept_energy, strict=True))
    assert spread.kept_energy != uniform.kept_energy

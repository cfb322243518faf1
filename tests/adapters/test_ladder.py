import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkwise_adapters.errors import InvalidCalibration
from chunkwise_adapters.format import InvalidRung, LoraPair, LoraWeights, ModuleKey
from chunkwise_adapters.ladder import Allocation, LadderModule, RankLadder, build_ladder
from chunkwise_adapters.whitening import Calibration, ShrinkMoments

MIXED_RANKS: dict[ModuleKey, int] = {(0, "q_proj"): 16, (0, "v_proj"): 4, (1, "down_proj"): 32, (1, "up_proj"): 7}
BOTH: tuple[Allocation, ...] = ("uniform", "global")


def delta(pair: LoraPair) -> Tensor:
    return pair.scale * (pair.b.double() @ pair.a.double())


def prefix(module: LadderModule, k: int) -> Tensor:
    return module.b_t[:k].double().T @ module.a[:k].double()


def inputs_of(weights: LoraWeights, tokens: int, seed: int = 0) -> dict[ModuleKey, Tensor]:
    """Inputs x [tokens, in] of every module, of very unequal spread over their directions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tokens, pair.a.shape[1], generator=generator, dtype=torch.float64)
        * torch.logspace(1, -2, pair.a.shape[1], dtype=torch.float64)
        for key, pair in weights.modules.items()
    }


def costs_of_rungs(ladder: RankLadder) -> list[float]:
    """What every rung costs, in ranks of all modules."""
    total = sum(module.cost for module in ladder.modules.values())
    return [
        sum(module.cost * ladder.active_ranks[key][i] for key, module in ladder.modules.items()) / total
        for i in range(len(ladder.rungs))
    ]


def half_a_rank(ladder: RankLadder) -> float:
    """How far a global rung may be from its budget: half a rank of the dearest module."""
    costs = [module.cost for module in ladder.modules.values()]
    return max(costs) / sum(costs) / 2 + 1e-9


def moments_of(weights: LoraWeights, inputs: dict[ModuleKey, Tensor]) -> ShrinkMoments:
    shrunk = {key: x @ weights.modules[key].a.double().T for key, x in inputs.items()}
    second = {key: h.T @ h / len(h) for key, h in shrunk.items()}
    return ShrinkMoments(weights.content_hash, Calibration("text", len(next(iter(inputs.values())))), second)


def output_error(pair: LoraPair, module: LadderModule, k: int, x: Tensor) -> float:
    """Mean squared output error of the first k ranks on the inputs x."""
    return float(((delta(pair) - prefix(module, k)) @ x.T).square().sum()) / len(x)


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


def test_default_rungs_of_a_global_ladder_go_below_one(make_weights: Callable[..., LoraWeights]) -> None:
    rungs = build_ladder(make_weights(rank=8), allocation="global").rungs
    assert rungs == (0, 0.25, 0.5, 1, 2, 4, 8)
    assert f"{rungs}" == "(0, 0.25, 0.5, 1, 2, 4, 8)"


def test_a_fraction_is_a_share_of_all_modules_cost(make_weights: Callable[..., LoraWeights]) -> None:
    ladder = build_ladder(make_weights(rank=MIXED_RANKS), rungs=[0.25, 0.5, 0.6, 1.5], allocation="global")
    assert costs_of_rungs(ladder)[:4] == pytest.approx([0.25, 0.5, 0.6, 1.5], abs=half_a_rank(ladder))
    worth = {key: float(m.singular_values[0]) / m.cost**0.5 for key, m in ladder.modules.items()}
    assert ladder.active_ranks[max(worth, key=worth.__getitem__)][0] >= 1
    assert ladder.rung_index(0.5) == 1
    with pytest.raises(InvalidRung, match=r"no rung 0\.3; its rungs are \(0\.25, 0\.5, 0\.6, 1\.5, 32\)"):
        ladder.rung_index(0.3)


def test_uniform_ranks_refuse_fractions(make_weights: Callable[..., LoraWeights]) -> None:
    assert build_ladder(make_weights(rank=4), rungs=[2.0]).rungs == (2, 4)
    with pytest.raises(InvalidRung, match=r"rungs \[0\.5\] are fractions.*use global allocation, or whole rungs"):
        build_ladder(make_weights(rank=4), rungs=[0.5, 1])


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
def test_rungs_are_nested_and_cost_what_uniform_ones_do(
    make_weights: Callable[..., LoraWeights], allocation: Allocation
) -> None:
    ladder = build_ladder(make_weights(rank=MIXED_RANKS), allocation=allocation)
    for key, ranks in ladder.active_ranks.items():
        assert all(before <= after for before, after in itertools.pairwise(ranks))
        assert ranks[-1] == len(ladder.modules[key].a) == MIXED_RANKS[key]
    cost = {key: module.cost for key, module in ladder.modules.items()}
    uniform = [
        sum(min(rung, MIXED_RANKS[key]) * cost[key] for key in cost) / sum(cost.values()) for rung in ladder.rungs
    ]
    assert costs_of_rungs(ladder) == pytest.approx(uniform, abs=half_a_rank(ladder))
    assert ladder.mean_active_rank == pytest.approx(costs_of_rungs(ladder))


def test_uniform_gives_every_module_the_budget_up_to_its_rank(make_weights: Callable[..., LoraWeights]) -> None:
    ladder = build_ladder(make_weights(rank=MIXED_RANKS))
    assert ladder.active_ranks[0, "v_proj"] == (0, 1, 2, 4, 4, 4, 4)
    assert ladder.active_ranks[1, "up_proj"] == (0, 1, 2, 4, 7, 7, 7)


def test_global_keeps_what_has_most_energy_for_its_cost(make_weights: Callable[..., LoraWeights]) -> None:
    ladder = build_ladder(make_weights(rank=MIXED_RANKS), allocation="global")
    for i in range(len(ladder.rungs)):
        kept, dropped = [], []
        for key, module in ladder.modules.items():
            worth, cut = (module.singular_values.double() ** 2 / module.cost).tolist(), ladder.active_ranks[key][i]
            kept += worth[:cut]
            dropped += worth[cut:]
        assert min(kept, default=float("inf")) >= max(dropped, default=0.0)


def test_global_splits_ties_as_uniform_does() -> None:
    pair = LoraPair(torch.eye(8, 10), torch.eye(9, 8), 8, 1.0)
    weights = LoraWeights("a", "hash", {(layer, "q_proj"): pair for layer in range(5)})
    rungs = [0, 1, 2, 4]
    assert build_ladder(weights, rungs, "global").active_ranks == build_ladder(weights, rungs).active_ranks


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


def test_global_keeps_more_energy_for_its_cost_than_uniform(make_weights: Callable[..., LoraWeights]) -> None:
    weights = make_weights(rank=MIXED_RANKS)
    uniform, spread = (build_ladder(weights, [1, 2, 4, 8], allocation) for allocation in BOTH)
    for i in range(4):
        gained = (spread.kept_energy[i] - uniform.kept_energy[i]) / uniform.kept_energy[i]
        assert gained > spread.mean_active_rank[i] / uniform.mean_active_rank[i] - 1


class TestWhitened:
    @given(pair=pairs(), tokens=st.sampled_from([1, 3, 50]), seed=st.integers(0, 2**31))
    @settings(deadline=None)
    def test_measured_output_error_is_the_predicted_one_at_every_rank(
        self, pair: LoraPair, tokens: int, seed: int
    ) -> None:
        """Also with fewer tokens than ranks, where the second moment is singular."""
        weights = LoraWeights("a", "hash", {(0, "q_proj"): pair})
        inputs = inputs_of(weights, tokens, seed)
        module = build_ladder(weights, fitted=moments_of(weights, inputs)).modules[0, "q_proj"]
        squares = module.singular_values.double() ** 2
        total = float(squares.sum())
        for k in range(len(module.a) + 1):
            measured = output_error(pair, module, k, inputs[0, "q_proj"])
            assert measured == pytest.approx(float(squares[k:].sum()), rel=1e-4, abs=1e-6 * total)

    @given(pair=pairs(), tokens=st.sampled_from([1, 3, 50]))
    @settings(deadline=None)
    def test_full_rank_is_the_same_update(self, pair: LoraPair, tokens: int) -> None:
        weights = LoraWeights("a", "hash", {(0, "q_proj"): pair})
        ladder = build_ladder(weights, fitted=moments_of(weights, inputs_of(weights, tokens)))
        module = ladder.modules[0, "q_proj"]
        torch.testing.assert_close(prefix(module, len(module.a)), delta(pair), rtol=0, atol=1e-5)
        identity = torch.eye(len(module.a))
        torch.testing.assert_close(module.b_t @ module.b_t.T, identity, rtol=0, atol=1e-5)

    def test_no_approximation_of_the_output_has_a_smaller_error(self, make_weights: Callable[..., LoraWeights]) -> None:
        """The best rank-k approximation of the outputs themselves (Eckart and Young) is the bound."""
        weights = make_weights(rank=MIXED_RANKS)
        inputs = inputs_of(weights, 200)
        ladder = build_ladder(weights, fitted=moments_of(weights, inputs))
        for key, pair in weights.modules.items():
            best = torch.linalg.svdvals(delta(pair) @ inputs[key].T) ** 2 / 200
            for k in range(pair.trained_rank + 1):
                error = output_error(pair, ladder.modules[key], k, inputs[key])
                assert error == pytest.approx(float(best[k:].sum()), rel=1e-4, abs=1e-6 * float(best.sum()))

    def test_factors_are_those_of_the_formula(self, make_weights: Callable[..., LoraWeights]) -> None:
        """``R_b G^{1/2} = U S Vᵀ``, ``B' = Q_b U``, ``A' = S Vᵀ G^{-1/2} A``; signs of directions are free."""
        weights = make_weights(rank=8)
        moments = moments_of(weights, inputs_of(weights, 300))
        ladder = build_ladder(weights, fitted=moments)
        for key, pair in weights.modules.items():
            values, vectors = torch.linalg.eigh(moments.second[key])
            root = (vectors * values.sqrt()) @ vectors.T
            q_b, r_b = torch.linalg.qr(pair.scale * pair.b.double())
            u, s, v_h = torch.linalg.svd(r_b @ root)
            a = (s[:, None] * v_h) @ torch.linalg.inv(root) @ pair.a.double()
            module = ladder.modules[key]
            torch.testing.assert_close(module.singular_values.double(), s, rtol=1e-5, atol=0)
            sign = ((q_b @ u).T * module.b_t).sum(dim=1).sign()
            torch.testing.assert_close(module.b_t.double(), sign[:, None] * (q_b @ u).T, rtol=0, atol=1e-5)
            torch.testing.assert_close(module.a.double(), sign[:, None] * a, rtol=0, atol=1e-4)

    def test_white_inputs_give_the_plain_ladder(self, make_weights: Callable[..., LoraWeights]) -> None:
        weights = make_weights(rank=MIXED_RANKS)
        second = {key: (pair.a @ pair.a.T).double() for key, pair in weights.modules.items()}
        white = ShrinkMoments(weights.content_hash, Calibration("text", 1), second)
        plain, whitened = build_ladder(weights), build_ladder(weights, fitted=white)
        for key, module in plain.modules.items():
            torch.testing.assert_close(
                whitened.modules[key].singular_values, module.singular_values, rtol=1e-4, atol=1e-5
            )

    def test_directions_that_the_data_never_shows_come_last_in_plain_order(
        self, make_weights: Callable[..., LoraWeights]
    ) -> None:
        weights = make_weights(rank=8)
        inputs = {key: x[:3] for key, x in inputs_of(weights, 3).items()}
        ladder = build_ladder(weights, fitted=moments_of(weights, inputs))
        for module in ladder.modules.values():
            assert (module.singular_values[:3] > 0).all() and not module.singular_values[3:].any()
            rows = module.a[3:].double()
            torch.testing.assert_close(torch.linalg.svdvals(rows), rows.norm(dim=1), rtol=1e-4, atol=0)

    def test_errors_energies_and_allocation_follow_the_outputs(self, make_weights: Callable[..., LoraWeights]) -> None:
        weights = make_weights(rank=MIXED_RANKS)
        inputs = inputs_of(weights, 100)
        moments = moments_of(weights, inputs)
        uniform, spread = (build_ladder(weights, [0, 1, 2, 4, 8], each, moments) for each in BOTH)
        for ladder in (uniform, spread):
            assert (ladder.kind, ladder.calibration) == ("whitened", Calibration("text", 100))
            for i, predicted in enumerate(ladder.truncation_errors):
                measured = sum(
                    output_error(weights.modules[key], ladder.modules[key], ranks[i], inputs[key])
                    for key, ranks in ladder.active_ranks.items()
                )
                assert measured == pytest.approx(predicted, rel=1e-4, abs=1e-6 * ladder.truncation_errors[0])
                kept = 1.0 - predicted / ladder.truncation_errors[0]
                assert ladder.kept_energy[i] == pytest.approx(kept, abs=1e-9)
        assert all(g <= u for g, u in zip(spread.truncation_errors, uniform.truncation_errors, strict=True))

    def test_a_silent_module_falls_back_to_the_plain_order(self, make_weights: Callable[..., LoraWeights]) -> None:
        weights = make_weights(rank=4)
        second = {key: torch.zeros(4, 4, dtype=torch.float64) for key in weights.modules}
        ladder = build_ladder(weights, fitted=ShrinkMoments(weights.content_hash, Calibration("t", 1), second))
        plain = build_ladder(weights)
        assert ladder.kept_energy == (1.0,) * len(ladder.rungs)
        for key, module in ladder.modules.items():
            torch.testing.assert_close(prefix(module, 2), prefix(plain.modules[key], 2), rtol=0, atol=1e-5)


def test_plain_errors_are_those_of_the_weights(make_weights: Callable[..., LoraWeights]) -> None:
    weights = make_weights(rank=MIXED_RANKS)
    ladder = build_ladder(weights, allocation="global")
    assert (ladder.kind, ladder.allocation, ladder.calibration) == ("plain", "global", None)
    for i, predicted in enumerate(ladder.truncation_errors):
        measured = sum(
            float((delta(weights.modules[key]) - prefix(ladder.modules[key], ranks[i])).square().sum())
            for key, ranks in ladder.active_ranks.items()
        )
        assert measured == pytest.approx(predicted, rel=1e-5, abs=1e-6)


def test_global_is_the_best_of_all_ways_to_spend_its_cost() -> None:
    generator = torch.Generator().manual_seed(3)
    modules = {
        (layer, "q_proj"): LoraPair(
            torch.randn(3, 5 + 4 * layer, generator=generator),
            torch.randn(6, 3, generator=generator),
            3,
            2.0**layer,
        )
        for layer in range(3)
    }
    ladder = build_ladder(LoraWeights("a", "hash", modules), allocation="global")
    squares = [module.singular_values.double() ** 2 for module in ladder.modules.values()]
    costs = [module.cost for module in ladder.modules.values()]
    assert len(set(costs)) == 3
    for i in range(len(ladder.rungs)):
        spent = sum(module.cost * ladder.active_ranks[key][i] for key, module in ladder.modules.items())
        ways = (
            way
            for way in itertools.product(range(4), repeat=3)
            if sum(cost * k for cost, k in zip(costs, way, strict=True)) <= spent
        )
        best = min(sum(float(s[k:].sum()) for s, k in zip(squares, way, strict=True)) for way in ways)
        assert ladder.truncation_errors[i] == pytest.approx(best)


class TestMomentsThatDoNotFit:
    @pytest.fixture
    def weights(self, make_weights: Callable[..., LoraWeights]) -> LoraWeights:
        return make_weights(rank={(0, "q_proj"): 4, (1, "up_proj"): 4})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"adapter_hash": "other"}, "content other.*gather them again"),
            ({"calibration": Calibration("text", 0)}, "no tokens"),
            ({"second": {}}, r"layer 0 q_proj: moment None; expected is \(4, 4\)"),
            ({"second": {(0, "q_proj"): torch.eye(3)}}, r"moment \(3, 3\)"),
            ({"second": {(0, "q_proj"): torch.full((4, 4), float("nan"))}}, "layer 0 q_proj.*NaN"),
        ],
    )
    def test_are_refused(self, weights: LoraWeights, change: dict[str, Any], message: str) -> None:
        moments = moments_of(weights, inputs_of(weights, 5))
        with pytest.raises(InvalidCalibration, match=message):
            build_ladder(weights, fitted=replace(moments, **change))

"""The grouped operator against the reference over punica's popularity matrix, and the reference against B A x."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from chunkwise_adapters.format import LoraWeights
from chunkwise_adapters.gate import GatedSpan, LoraSegment, build_segments
from chunkwise_adapters.ladder import Allocation, build_ladder
from chunkwise_adapters.ops import choose_op, cpu, reference
from chunkwise_adapters.store import AdapterStore, ResidentAdapter, ResidentModule

CPU = torch.device("cpu")
KEYS = [(0, "v_proj"), (1, "down_proj")]
N_ADAPTERS = 5
POPULARITY: dict[str, Sequence[float]] = {
    "uniform": (1, 1, 1, 1, 1),
    "zipf": (1, 1 / 2, 1 / 3, 1 / 4, 1 / 5),
    "identical": (1, 0, 0, 0, 0),
    "skewed": (20, 1, 1, 0, 0),
}


@dataclass(frozen=True)
class FakeChunk:
    start: int
    rung: int | None
    scale: float = 1.0
    crossfade: int = 0


Residents = dict[Allocation, list[ResidentAdapter]]


@pytest.fixture(scope="module")
def residents(make_weights: Callable[..., LoraWeights]) -> Residents:
    """Five adapters of rank 32, the last one without a v_proj in layer 0, as uniform and as global ladders."""
    weights = [make_weights(f"a{i}", rank=32, seed=i) for i in range(N_ADAPTERS)]
    del weights[-1].modules[0, "v_proj"]
    allocations: tuple[Allocation, ...] = ("uniform", "global")
    return {
        allocation: [
            AdapterStore(None, torch.float32, CPU).add(build_ladder(w, allocation=allocation)) for w in weights
        ]
        for allocation in allocations
    }


def chunks_of(rank: str, rng: random.Random) -> tuple[FakeChunk, ...]:
    if rank != "mixed":
        return (FakeChunk(0, int(rank), scale=rng.choice((1.0, 0.7))),)
    starts = range(rng.randrange(2), 40, 7)
    return tuple(
        FakeChunk(start, rng.choice((0, 4, 8, 16, 32, None)), rng.choice((1.0, 1.0, 0.7)), rng.choice((0, 3)))
        for start in starts
    )


def step(adapters: Sequence[ResidentAdapter], popularity: str, rank: str, phase: str) -> list[GatedSpan]:
    rng = random.Random(f"{popularity} {rank} {phase}")
    lengths = {"prefill": [17, 9, 24], "decode": [1] * 9, "both": [1, 1, 20, 1, 1, 11, 1]}[phase]
    spans, row = [], 0
    for i, n_tokens in enumerate(lengths):
        row += rng.random() < 0.2
        adapter = (
            adapters[i % N_ADAPTERS] if popularity == "distinct" else rng.choices(adapters, POPULARITY[popularity])[0]
        )
        position = 0 if n_tokens > 1 else rng.randrange(40)
        spans.append(GatedSpan(row, n_tokens, position, adapter, chunks_of(rank, rng)))
        row += n_tokens
    return spans


def column_view(x: torch.Tensor, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A fused output and the columns of it that belong to the module."""
    fused = torch.randn(len(x), out + 11, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    return fused, fused[:, 4 : 4 + out]


def inputs(spans: Sequence[GatedSpan], width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = spans[-1].first_row + spans[-1].n_tokens + 1
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
@pytest.mark.parametrize("rank", ["0", "4", "8", "16", "32", "mixed"])
@pytest.mark.parametrize("popularity", ["distinct", *POPULARITY])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_grouped_equals_reference(
    residents: Residents, allocation: Allocation, popularity: str, rank: str, phase: str
) -> None:
    spans = step(residents[allocation], popularity, rank, phase)
    segments = build_segments(spans, CPU)
    for key, (out, width) in zip(KEYS, [(40, 48), (48, 64)], strict=True):
        x = inputs(spans, width)
        fused, y = column_view(x, out)
        expected, expected_y = column_view(x, out)
        choose_op(CPU)(y, x, segments, key)
        reference.gated_lora_(expected_y, x, segments, key)
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [cpu.gated_lora_, reference.gated_lora_])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_without_chunks_it_is_plain_lora_and_other_rows_are_untouched(
    make_weights: Callable[..., LoraWeights], residents: Residents, allocation: Allocation, op: Callable[..., None]
) -> None:
    key = (1, "down_proj")
    pair = make_weights("a2", rank=32, seed=2).modules[key]
    spans = [GatedSpan(2, 3, 0, residents[allocation][2], ()), GatedSpan(6, 1, 9, residents[allocation][2], ())]
    x = inputs(spans, 64)
    y = torch.zeros(len(x), 48)
    op(y, x, build_segments(spans, CPU), key)
    expected = pair.scale * (x @ pair.a.T @ pair.b.T)
    expected[[0, 1, 5, 7]] = 0.0
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [cpu.gated_lora_, reference.gated_lora_])
def test_an_adapter_without_the_module_adds_nothing(residents: Residents, op: Callable[..., None]) -> None:
    spans = [GatedSpan(0, 3, 0, residents["uniform"][-1], ())]
    y = torch.randn(4, 40)
    before = y.clone()
    op(y, inputs(spans, 48), build_segments(spans, CPU), (0, "v_proj"))
    assert torch.equal(y, before)


@pytest.mark.parametrize("crossfade", [0, 3])
def test_factors_beyond_the_widest_rung_needed_are_never_read(residents: Residents, crossfade: int) -> None:
    """The unused rows are NaN: one read of them would spoil the output."""
    key, whole = (1, "down_proj"), residents["uniform"][0]
    module = whole.modules[key]
    a, b_t = module.a.clone(), module.b_t.clone()
    a[8:], b_t[8:] = float("nan"), float("nan")
    info = (whole.name, whole.content_hash, whole.trained_rank, whole.rungs, whole.kept_energy, whole.mean_active_rank)
    poisoned = ResidentAdapter(*info, {key: ResidentModule(a, b_t, module.active_ranks)})
    chunks = (FakeChunk(0, 8), FakeChunk(5, 4, 0.7, crossfade), FakeChunk(10, 0, 1.0, crossfade))
    x = torch.randn(15, 64)
    outputs = []
    for adapter in (poisoned, whole):
        outputs.append(torch.zeros(15, 48))
        cpu.gated_lora_(outputs[-1], x, build_segments([GatedSpan(0, 15, 0, adapter, chunks)], CPU), key)
    assert torch.equal(*outputs) and outputs[0].any()


def test_a_batch_equals_its_sequences_alone(residents: Residents) -> None:
    key = (1, "down_proj")
    spans = step(residents["global"], "zipf", "mixed", "both")
    x = inputs(spans, 64)
    together, alone = torch.zeros(len(x), 48), torch.zeros(len(x), 48)
    cpu.gated_lora_(together, x, build_segments(spans, CPU), key)
    for span in spans:
        cpu.gated_lora_(alone, x, build_segments([span], CPU), key)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_half_precision_stays_close_to_the_reference(make_weights: Callable[..., LoraWeights]) -> None:
    key = (1, "down_proj")
    store = AdapterStore(None, torch.bfloat16, CPU)
    adapters = [store.add(build_ladder(make_weights(f"a{i}", rank=32, seed=i))) for i in range(N_ADAPTERS)]
    spans = step(adapters, "uniform", "mixed", "both")
    x = inputs(spans, 64, torch.bfloat16)
    segments: tuple[LoraSegment, ...] = build_segments(spans, CPU)
    y, expected = torch.zeros(len(x), 48, dtype=torch.bfloat16), torch.zeros(len(x), 48, dtype=torch.float64)
    cpu.gated_lora_(y, x, segments, key)
    reference.gated_lora_(expected, x, segments, key)
    error = torch.linalg.vector_norm(y.double() - expected) / torch.linalg.vector_norm(expected)
    assert error < 0.01

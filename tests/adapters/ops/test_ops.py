"""Every operator against the reference over punica's popularity matrix, and the reference against B A x."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from chunkwise_adapters.format import LoraPair, LoraWeights, ModuleKey
from chunkwise_adapters.gate import GatedSpan, build_segments
from chunkwise_adapters.ladder import Allocation, build_ladder
from chunkwise_adapters.ops import GatedLora, choose_op, reference
from chunkwise_adapters.store import AdapterStore, ResidentAdapter, ResidentModule
from gpu import DEVICE, kernels

CPU = torch.device("cpu")
SHAPES: dict[ModuleKey, tuple[int, int]] = {(0, "v_proj"): (66, 70), (1, "down_proj"): (70, 101)}
KEY: ModuleKey = (1, "down_proj")
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


@dataclass(frozen=True)
class Operator:
    """How to make an operator, and where its tensors live."""

    make: Callable[[], GatedLora]
    device: torch.device


def _triton(**blocks: int) -> GatedLora:
    module = kernels("chunkwise_adapters.ops.triton")
    op: GatedLora = module.TritonLora(DEVICE, module.Blocks(**blocks))
    return op


OPERATORS = {
    "reference": Operator(lambda: reference.gated_lora_, CPU),
    "cpu": Operator(lambda: choose_op(CPU), CPU),
    "triton": Operator(_triton, DEVICE),
    # The interpreter's time goes with the number of programs: a module is one program per tile and kernel here.
    "triton, wide": Operator(lambda: _triton(ranks=64, inputs=128, outputs=128, splits=1), DEVICE),
}
MATRIX_OPERATORS = ["cpu", "triton, wide", *(["triton"] if DEVICE.type == "cuda" else [])]


@pytest.fixture(params=["cpu", "reference", "triton"])
def operator(request: pytest.FixtureRequest) -> Operator:
    return OPERATORS[request.param]


Make = Callable[..., list[ResidentAdapter]]


@pytest.fixture(scope="module")
def weights() -> list[LoraWeights]:
    """Five adapters of rank 64, 64, 32, 64 and 64; the last one has no v_proj."""
    generator = torch.Generator().manual_seed(0)

    def pair(shape: tuple[int, int], rank: int) -> LoraPair:
        decay = torch.logspace(0, -1.5, rank)[:, None]
        a = torch.randn(rank, shape[1], generator=generator) * decay
        b = torch.randn(shape[0], rank, generator=generator) * (0.1 + torch.rand((), generator=generator))
        return LoraPair(a, b, trained_rank=rank, scale=0.5)

    made = []
    for i in range(N_ADAPTERS):
        rank = 32 if i == 2 else 64
        modules = {key: pair(shape, rank) for key, shape in SHAPES.items()}
        made.append(LoraWeights(f"a{i}", f"hash-{i}", modules))
    del made[-1].modules[0, "v_proj"]
    return made


@pytest.fixture(scope="module")
def residents(weights: list[LoraWeights]) -> Make:
    """residents(allocation, device, dtype): the adapters, made once for each."""
    made: dict[tuple[Allocation, torch.device, torch.dtype], list[ResidentAdapter]] = {}

    def make(
        allocation: Allocation, device: torch.device = CPU, dtype: torch.dtype = torch.float32
    ) -> list[ResidentAdapter]:
        key = (allocation, device, dtype)
        if key not in made:
            store = AdapterStore(None, dtype, device)
            made[key] = [store.add(build_ladder(w, allocation=allocation)) for w in weights]
        return made[key]

    return make


def chunks_of(rank: str, rng: random.Random) -> tuple[FakeChunk, ...]:
    if rank != "mixed":
        return (FakeChunk(0, int(rank), scale=rng.choice((1.0, 0.7))),)
    starts = range(rng.randrange(2), 40, 7)
    return tuple(
        FakeChunk(start, rng.choice((0, 4, 8, 16, 32, None)), rng.choice((1.0, 1.0, 0.7)), rng.choice((0, 3)))
        for start in starts
    )


def step(adapters: Sequence[ResidentAdapter], popularity: str, rank: str, phase: str) -> list[GatedSpan]:
    """The spans of one step, some rows of which belong to none. An adapter of rank 32 runs at 32 where 64 is asked."""
    rng = random.Random(f"{popularity} {rank} {phase}")
    lengths = {"prefill": [17, 9, 24], "decode": [1] * 9, "both": [1, 1, 20, 1, 1, 11, 1]}[phase]
    spans, row = [], 0
    for i, n_tokens in enumerate(lengths):
        row += rng.random() < 0.2
        distinct = popularity == "distinct"
        adapter = adapters[i % N_ADAPTERS] if distinct else rng.choices(adapters, POPULARITY[popularity])[0]
        position = 0 if n_tokens > 1 else rng.randrange(40)
        asked = "32" if rank == "64" and adapter.trained_rank == 32 else rank
        spans.append(GatedSpan(row, n_tokens, position, adapter, chunks_of(asked, rng)))
        row += n_tokens
    return spans


def column_view(x: torch.Tensor, out: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A fused output and the columns of it that belong to the module."""
    fused = torch.randn(len(x), out + 11, generator=torch.Generator().manual_seed(3)).to(x.device, dtype or x.dtype)
    return fused, fused[:, 4 : 4 + out]


def inputs(
    spans: Sequence[GatedSpan], width: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    rows = spans[-1].first_row + spans[-1].n_tokens + 1
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2)).to(device, dtype)


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
@pytest.mark.parametrize("rank", ["0", "4", "8", "16", "32", "64", "mixed"])
@pytest.mark.parametrize("popularity", ["distinct", *POPULARITY])
@pytest.mark.parametrize("name", MATRIX_OPERATORS)
def test_equals_the_reference(residents: Make, name: str, popularity: str, rank: str, phase: str) -> None:
    device, op = OPERATORS[name].device, OPERATORS[name].make()
    for allocation in ("global",) if "triton" in name else ("uniform", "global"):
        spans = step(residents(allocation, device), popularity, rank, phase)
        segments = build_segments(spans, device)
        for key, (out, width) in SHAPES.items():
            x = inputs(spans, width, device)
            fused, y = column_view(x, out)
            expected, expected_y = column_view(x, out)
            op(y, x, segments, key)
            reference.gated_lora_(expected_y, x, segments, key)
            torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_without_chunks_it_is_plain_lora_and_other_rows_are_untouched(
    weights: list[LoraWeights], residents: Make, allocation: Allocation, operator: Operator
) -> None:
    adapter, pair = residents(allocation, operator.device)[2], weights[2].modules[KEY]
    spans = [GatedSpan(2, 3, 0, adapter, ()), GatedSpan(6, 1, 9, adapter, ())]
    x = inputs(spans, 101)
    y = torch.zeros(len(x), 70, device=operator.device)
    operator.make()(y, x.to(operator.device), build_segments(spans, operator.device), KEY)
    expected = pair.scale * (x @ pair.a.T @ pair.b.T)
    expected[[0, 1, 5, 7]] = 0.0
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_the_module_adds_nothing(residents: Make, operator: Operator) -> None:
    spans = [GatedSpan(0, 3, 0, residents("uniform", operator.device)[-1], ())]
    y = torch.randn(4, 66, device=operator.device)
    before = y.clone()
    operator.make()(y, inputs(spans, 70, operator.device), build_segments(spans, operator.device), (0, "v_proj"))
    assert torch.equal(y, before)


@pytest.mark.parametrize("crossfade", [0, 3])
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_factors_beyond_the_widest_rung_needed_are_never_read(residents: Make, name: str, crossfade: int) -> None:
    """The unused rows are NaN: one read of them would spoil the output."""
    device, op = OPERATORS[name].device, OPERATORS[name].make()
    whole = residents("uniform", device)[0]
    module = whole.modules[KEY]
    a, b_t = module.a.clone(), module.b_t.clone()
    a[8:], b_t[8:] = float("nan"), float("nan")
    info = (whole.name, whole.content_hash, whole.trained_rank, whole.rungs, whole.kept_energy, whole.mean_active_rank)
    poisoned = ResidentAdapter(*info, {KEY: ResidentModule(a, b_t, module.active_ranks)})
    chunks = (FakeChunk(0, 8), FakeChunk(5, 4, 0.7, crossfade), FakeChunk(10, 0, 1.0, crossfade))
    x = torch.randn(15, 101, device=device)
    outputs = []
    for adapter in (poisoned, whole):
        outputs.append(torch.zeros(15, 70, device=device))
        op(outputs[-1], x, build_segments([GatedSpan(0, 15, 0, adapter, chunks)], device), KEY)
    assert torch.equal(*outputs) and outputs[0].any()


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_batch_equals_its_sequences_alone(residents: Make, name: str) -> None:
    device, op = OPERATORS[name].device, OPERATORS[name].make()
    spans = step(residents("global", device), "zipf", "mixed", "both")
    x = inputs(spans, 101, device)
    together, alone = torch.zeros(len(x), 70, device=device), torch.zeros(len(x), 70, device=device)
    op(together, x, build_segments(spans, device), KEY)
    for span in spans:
        op(alone, x, build_segments([span], device), KEY)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_half_precision_stays_close_to_the_reference(
    residents: Make, name: str, dtype: torch.dtype, most: float
) -> None:
    device, op = OPERATORS[name].device, OPERATORS[name].make()
    spans = step(residents("uniform", device, dtype), "uniform", "mixed", "both")
    x = inputs(spans, 101, device, dtype)
    segments = build_segments(spans, device)
    y = torch.zeros(len(x), 70, dtype=dtype, device=device)
    expected = torch.zeros(len(x), 70, dtype=torch.float64, device=device)
    op(y, x, segments, KEY)
    reference.gated_lora_(expected, x, segments, KEY)
    error = torch.linalg.vector_norm(y.double() - expected) / torch.linalg.vector_norm(expected)
    assert error < most

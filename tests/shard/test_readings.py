"""Kernel and torch against the definitions in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chunkwise.shard.readings import Readings, read_by_torch, read_logits

Read = Callable[[Tensor], Readings]

either = pytest.mark.parametrize("read", [read_logits, read_by_torch])


def _logits(rows: int, vocab: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread


@either
@pytest.mark.parametrize("vocab", [2, 7, 8, 259, 4095, 4096, 4097, 50_000])
@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
def test_readings_are_entropy_and_greedy_choice(read: Read, vocab: int, spread: float) -> None:
    logits = _logits(3, vocab, spread)
    readings = read(logits)
    log_p = logits.double().log_softmax(dim=-1)
    ids = logits.argmax(dim=-1)
    assert readings.likeliest == ids.tolist()
    assert readings.logprobs == pytest.approx(log_p.gather(1, ids[:, None])[:, 0].tolist(), abs=1e-5, rel=1e-5)
    entropies = torch.special.entr(log_p.exp()).sum(dim=-1) / math.log(vocab)
    assert readings.entropies == pytest.approx(entropies.tolist(), abs=1e-6, rel=1e-5)


@either
def test_entropy_of_certain_and_uniform_distributions(read: Read) -> None:
    logits = torch.stack([torch.zeros(64), torch.tensor([100.0] + [0.0] * 63)])
    assert read(logits).entropies == pytest.approx([1.0, 0.0], abs=1e-6)
    half = torch.zeros(64)
    half[:32] = 50.0
    assert read(half[None]).entropies == pytest.approx([math.log(32) / math.log(64)], rel=1e-4)


@either
@pytest.mark.parametrize("places", [(3, 4), (4095, 4096), (5000, 9000)])
def test_the_first_of_several_likeliest_is_taken(read: Read, places: tuple[int, int]) -> None:
    logits = _logits(1, 10_000).clamp(max=-0.5)
    for value in (-0.25, 0.0, 7.0):
        logits[0, list(places)] = value
        assert read(logits).likeliest == [places[0]]


@either
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_row_with_a_logit_that_is_not_finite_has_no_entropy_and_its_neighbours_do(read: Read, value: float) -> None:
    logits = _logits(3, 5000)
    logits[1, 4999] = value
    assert [math.isnan(entropy) for entropy in read(logits).entropies] == [False, True, False]


@either
def test_the_largest_finite_logits_are_finite(read: Read) -> None:
    logits = torch.full((1, 100), 1e38)
    logits[0, 5] = 3e38
    assert read(logits).likeliest == [5]
    assert read(logits).entropies == pytest.approx([0.0], abs=1e-30)


def test_a_row_reads_the_same_bits_in_any_company_and_layout() -> None:
    logits = _logits(9, 5000)
    together = read_logits(logits.T.contiguous().T)
    for row in range(9):
        alone = read_logits(logits[row : row + 1])
        assert alone.likeliest == [together.likeliest[row]]
        assert alone.logprobs == [together.logprobs[row]]
        assert alone.entropies == [together.entropies[row]]


@either
def test_no_rows_have_no_readings(read: Read) -> None:
    assert read(torch.empty(0, 100)) == Readings([], [], [])

"""Base matrices, plain and in 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chunkwise.model.linear import FOUR_BITS, GROUP, Matrix, empty_matrix, quantize_groups, quantize_rows, store_matrix

WEIGHT = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 24)[:, None]


def test_a_plain_matrix_multiplies_as_torch_does() -> None:
    x = torch.randn(3, 40)
    assert torch.equal(Matrix(WEIGHT).times(x), F.linear(x, WEIGHT))
    assert torch.equal(Matrix(WEIGHT).rows(torch.tensor([5, 0, 5]), torch.float32), WEIGHT[[5, 0, 5]])


def test_eight_bits_are_off_by_at_most_half_a_scale() -> None:
    matrix = quantize_rows(WEIGHT)
    assert matrix.data.dtype == torch.int8 and matrix.scales is not None
    assert ((matrix.dense(torch.float32) - WEIGHT).abs() <= matrix.scales[:, None] * 0.5001).all()
    # Every row uses the whole range, so small rows are as precise as large ones.
    assert (matrix.data.abs().amax(dim=1) == 127).all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight = WEIGHT.clone()
    weight[3] = 0.0
    dense = quantize_rows(weight).dense(torch.float32)
    assert (dense[3] == 0.0).all() and torch.isfinite(dense).all()


@pytest.mark.parametrize("columns", [40, 39, 32, 1])
def test_four_bits_are_off_by_at_most_half_a_scale_where_nothing_is_cut_off(columns: int) -> None:
    weight = WEIGHT[:, :columns]
    matrix = quantize_groups(weight)
    assert matrix.scales is not None and matrix.shape == (24, columns)
    assert matrix.data.shape == (24, -(-columns // 2)) and matrix.scales.shape == (24, -(-columns // GROUP))
    scale = matrix.scales.repeat_interleave(GROUP, dim=1)[:, :columns]
    numbers = torch.stack((matrix.data & 15, matrix.data >> 4), dim=-1).flatten(1)[:, :columns]
    inside = (numbers > 0) & (numbers < 15)
    error = (matrix.dense(torch.float32) - weight).abs()
    # The middle is rounded to fp16.
    assert (error[inside] <= (0.5001 * scale + weight.abs() / 2048)[inside]).all()


def test_four_bits_are_nearer_than_a_range_around_zero_would_be() -> None:
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(1))
    scale = weight.view(64, -1, GROUP).abs().amax(dim=2).div(7.0).repeat_interleave(GROUP, dim=1)
    plain = torch.round(weight / scale).mul(scale)
    ours = quantize_groups(weight).dense(torch.float32)
    assert (ours - weight).square().sum() < 0.75 * (plain - weight).square().sum()


def test_sixteen_levels_in_a_group_are_kept_but_for_the_rounding_of_the_middle() -> None:
    """As in checkpoints that were in 4 bits before."""
    levels = torch.arange(16.0).repeat(2)[torch.randperm(32, generator=torch.Generator().manual_seed(2))]
    weight = (levels - 5.0) * torch.tensor([[0.125], [3.0]]) + torch.tensor([[0.0], [1.5]])
    torch.testing.assert_close(quantize_groups(weight).dense(torch.float32), weight, rtol=1e-3, atol=1e-3)


def test_a_group_of_equal_numbers_stays_what_it_was() -> None:
    weight = torch.zeros(2, 96)
    weight[1, 32:] = -3.25
    assert torch.equal(quantize_groups(weight).dense(torch.float32), weight)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8, FOUR_BITS])
def test_an_empty_matrix_takes_what_is_stored(storage: torch.dtype) -> None:
    weight = WEIGHT[:, :39]
    kept = store_matrix(weight, storage)
    place = empty_matrix(24, 39, storage, lambda rows, columns, dtype: torch.empty(rows, columns, dtype=dtype))
    assert place.shape == kept.shape == (24, 39)
    assert place.data.dtype == kept.data.dtype and place.data.shape == kept.data.shape
    for empty, full in ((place.scales, kept.scales), (place.middles, kept.middles)):
        assert (empty is None) == (full is None)
        if empty is not None and full is not None:
            assert empty.shape == full.shape and empty.dtype == full.dtype


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_groups])
def test_rows_and_products_agree_with_the_dense_matrix(quantize: Callable[[Tensor], Matrix]) -> None:
    matrix, x, ids = quantize(WEIGHT), torch.randn(3, 40), torch.tensor([7, 23, 0])
    dense = matrix.dense(torch.float32)
    assert torch.equal(matrix.rows(ids, torch.float32), dense[ids])
    assert torch.equal(matrix.times(x), F.linear(x, dense))

"""Base matrices, plain and in 8 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from chunkwise.model.linear import Matrix, quantize_rows

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


def test_rows_and_products_agree_with_the_dense_matrix() -> None:
    matrix, x, ids = quantize_rows(WEIGHT), torch.randn(3, 40), torch.tensor([7, 23, 0])
    dense = matrix.dense(torch.float32)
    assert torch.equal(matrix.rows(ids, torch.float32), dense[ids])
    assert torch.equal(matrix.times(x), F.linear(x, dense))

"""Every product equals the plain one, at every number of rows, on slices as well."""

from __future__ import annotations

import pytest
import torch

from chunkwise.model.linear import choose_product, plain_product, skinny_product


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 33])
def test_skinny_product_equals_the_plain_one(rows: int) -> None:
    torch.manual_seed(rows)
    wide, weight = torch.randn(rows, 80), torch.randn(50, 40)
    for x in (wide[:, :40].contiguous(), wide[:, 40:]):
        got = skinny_product(x, weight)
        assert got.is_contiguous()
        torch.testing.assert_close(got, plain_product(x, weight))
        torch.testing.assert_close(got, (x.double() @ weight.double().T).float())


def test_choice_follows_device_and_type() -> None:
    assert choose_product(torch.device("cpu"), torch.float32) is skinny_product
    assert choose_product(torch.device("cpu"), torch.bfloat16) is plain_product
    assert choose_product(torch.device("cuda"), torch.float32) is plain_product

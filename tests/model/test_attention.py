"""Paged attention, batched and ragged, against a plain loop; and the attention signal against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from chunkwise.model.attention import _decode, _prefill, spread


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int) -> torch.Tensor:
    """One query [H, D] at ``position`` over keys [L, K, D], head by head."""
    group = q.shape[0] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[0]):
        keys, values = k[: position + 1, head // group], v[: position + 1, head // group]
        out[head] = (keys @ q[head] / math.sqrt(q.shape[1])).softmax(0) @ values
    return out


@pytest.mark.parametrize(("heads", "kv"), [(6, 2), (4, 4), (3, 1)])
def test_prefill_and_decode_equal_the_loop(heads: int, kv: int) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(23, kv, 8), torch.randn(23, kv, 8)
    q = torch.randn(23, heads, 8)
    expected = torch.stack([_dense(q[i], k, v, i) for i in range(23)])
    torch.testing.assert_close(_prefill(q, k, v), expected)
    torch.testing.assert_close(_prefill(q[9:], k, v), expected[9:])
    contexts = torch.tensor([5, 23, 1])
    mask = torch.arange(23)[None] < contexts[:, None]
    rows = contexts - 1
    got = _decode(q[rows], k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), mask)
    torch.testing.assert_close(got, expected[rows])


def test_spread_is_one_for_uniform_and_near_zero_for_a_single_peak() -> None:
    contexts = torch.tensor([8, 8, 1])
    mask = torch.arange(10)[None] < contexts[:, None]
    keys = torch.zeros(3, 10, 4)
    keys[1, 2, 0] = 100.0
    keys[:, 9] = 1e6  # beyond every context: must not count
    q = torch.ones(3, 4)
    values = spread(q, keys, mask, contexts)
    assert values[0].item() == pytest.approx(1.0)
    assert values[1].item() == pytest.approx(0.0, abs=1e-6)
    assert values[2].item() == 0.0

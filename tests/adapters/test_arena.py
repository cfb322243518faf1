"""Matrices in one run of memory."""

from __future__ import annotations

import torch

from chunkwise_adapters.arena import Arena


def test_matrices_do_not_overlap_and_begin_on_cache_lines() -> None:
    arena = Arena()
    sizes = [
        (3, 5, torch.float32),
        (7, 1, torch.int8),
        (0, 4, torch.float32),
        (2, 3, torch.bfloat16),
        (9, 9, torch.int8),
    ]
    made = [arena.empty(*size).fill_(i) for i, size in enumerate(sizes)]
    for i, (matrix, (rows, columns, dtype)) in enumerate(zip(made, sizes, strict=True)):
        assert matrix.shape == (rows, columns) and matrix.dtype == dtype and matrix.is_contiguous()
        assert (matrix == i).all()
        assert matrix.data_ptr() % 64 == 0


def test_a_matrix_larger_than_a_slab_gets_its_own_and_outlives_the_arena() -> None:
    arena = Arena()
    small, large = arena.empty(1, 8, torch.int8).fill_(1), arena.empty(65, 1 << 20, torch.int8)
    large[-1] = 2
    del arena
    assert large[-1, -1] == 2 and (small == 1).all()

"""Milliseconds for all layer matrices and the head of SmolLM2-135M at several numbers of rows, in both products.

    .venv/bin/python scripts/bench_products.py

Random fp32 weights of the model's shapes, fused as the server fuses them (qkv, o, gate-up, down); medians. The last
line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from chunkwise.model.linear import Product, plain_product, skinny_product

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
LAYERS = 30
HEAD = (49152, 576)


def median_ms(act: Callable[[], object], rounds: int = 11) -> float:
    """Median time of ``act`` after one call that does not count."""
    act()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        act()
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 1)


def multiply(product: Product, weights: list[Tensor], inputs: dict[int, Tensor]) -> None:
    """One product with every weight; ``inputs`` by width."""
    for weight in weights:
        product(inputs[weight.shape[1]], weight)


def main() -> None:
    """Prints a table, then JSON."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in SHAPES] + [torch.randn(HEAD)]
    rows_of: dict[int, dict[str, float]] = {}
    print(f"{'rows':>5}{'plain':>9}{'skinny':>9}")
    for rows in (1, 2, 4, 6, 8, 12, 16):
        inputs = {width: torch.randn(rows, width) for _, width in SHAPES}

        with torch.inference_mode():
            rows_of[rows] = {
                "plain": median_ms(partial(multiply, plain_product, weights, inputs)),
                "skinny": median_ms(partial(multiply, skinny_product, weights, inputs)),
            }
        print(f"{rows:>5}{rows_of[rows]['plain']:>9}{rows_of[rows]['skinny']:>9}")
    megabytes = round(sum(weight.nbytes for weight in weights) / 1e6)
    print(json.dumps({"threads": threads, "weights_mb": megabytes, "ms": rows_of}))


if __name__ == "__main__":
    main()

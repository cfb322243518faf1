"""What a decode step costs by the format of the pages it reads."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from chunkwise.core import KvFormat
from chunkwise.kv.cache import KvCache
from chunkwise.kv.pages import PageRef
from chunkwise.model.llama import Llama
from chunkwise.model.step import StepInput, StepSpan

Table = list[PageRef]


def decode_seconds(model: Llama, batch: int, context: int, page_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of ``rounds`` decode steps of ``batch`` sequences that each hold ``context`` tokens, a multiple of
    ``page_size``, in "full", "int8" and "int4" pages and in all three by turns, "mixed". The four take turns step by
    step, on pages of random keys and values, after one round that is not counted."""
    shape, count = model.kv_shape(page_size), context // page_size
    page_bytes = shape.page_bytes(model.dtype)
    budget = batch * (count + 1) * sum(page_bytes.values())
    cache = KvCache(shape, model.dtype, model.device, max(budget, batch * (count + 1) * 2 * page_bytes[KvFormat.FULL]))
    full = [[cache.allocate(KvFormat.FULL) for _ in range(count)] for _ in range(batch)]
    _fill(cache, [page for table in full for page in table])
    tables = {"full": full}
    for kind in (KvFormat.INT8, KvFormat.INT4):
        shared = [[cache.allocator.share(page) for page in table] for table in full]
        tables[kind.name.lower()] = [cache.compress(table, kind) for table in shared]
    tables["mixed"] = [[list(tables.values())[place % 3][row][place] for place in range(count)] for row in range(batch)]
    last = [cache.allocate(KvFormat.FULL) for _ in range(batch)]
    steps = {name: _step(table, last, context, page_size) for name, table in tables.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            model.forward(step, cache)
            seconds[name].append(time.perf_counter() - started)
    return {name: measured[1:] for name, measured in seconds.items()}


def _fill(cache: KvCache, pages: Sequence[PageRef]) -> None:
    generator = torch.Generator(cache.device).manual_seed(0)
    for part in cache.pools[KvFormat.FULL].tensors.values():
        for page in pages:
            part[page.number].normal_(generator=generator)


def _step(tables: Sequence[Table], last: Sequence[PageRef], context: int, page_size: int) -> StepInput:
    """One token more for every table; its own page is ``last``, which the steps share: none reads it twice."""
    rows, none = torch.arange(len(tables)), torch.zeros(0, dtype=torch.int64)
    return StepInput(
        ids=rows + 1,
        positions=torch.full((len(tables),), context),
        slots=torch.tensor([page.number * page_size for page in last]),
        last_rows=rows,
        scored_rows=none,
        scored_ids=none,
        spans=tuple(
            StepSpan(row, 1, context + 1, [*table, page])
            for row, (table, page) in enumerate(zip(tables, last, strict=True))
        ),
        segments=(),
    )

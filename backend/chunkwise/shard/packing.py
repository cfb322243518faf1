"""Spans to one `StepInput`: the only place where request state becomes tensors."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import chain

import torch

from chunkwise.model.step import StepInput, StepSpan
from chunkwise.shard.scheduler import Span
from chunkwise_adapters.gate import GatedSpan, LoraSegment, build_segments


def _segments(spans: SequenceOf[Span], first_rows: SequenceOf[int], device: torch.device) -> tuple[LoraSegment, ...]:
    gated = [
        GatedSpan(row, span.tokens, span.sequence.computed, adapter, span.sequence.chunks)
        for span, row in zip(spans, first_rows, strict=True)
        if (adapter := span.sequence.adapter) is not None
    ]
    return build_segments(gated, device)


def _scored(span: Span, first_row: int) -> list[tuple[int, int]]:
    """Rows of a span whose next token is a prompt token, with that token, where prompt logprobs were asked for."""
    sequence = span.sequence
    if not sequence.request.prefill_logprobs:
        return []
    positions = range(sequence.computed, min(span.context, sequence.prompt_tokens - 1))
    return [(first_row + p - sequence.computed, sequence.ids[p + 1]) for p in positions]


def pack(spans: SequenceOf[Span], page_size: int, device: torch.device) -> StepInput:
    """The tensors of one step.

    ``spans`` are decoding spans first, as `schedule` orders them; every sequence must hold the pages for its span.

    Raises:
        InvalidRung: a chunk names a rung that its adapter's ladder lacks.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    first_rows: list[int] = []
    for span in spans:
        sequence = span.sequence
        first_rows.append(len(ids))
        ids.extend(sequence.ids[sequence.computed : span.context])
        for position in range(sequence.computed, span.context):
            page, offset = divmod(sequence.slot(position), page_size)
            positions.append(position)
            slots.append(sequence.pages[page].number * page_size + offset)

    scored = [pair for span, row in zip(spans, first_rows, strict=True) for pair in _scored(span, row)]
    lists = {
        "ids": ids,
        "positions": positions,
        "slots": slots,
        "last_rows": [row + span.tokens - 1 for row, span in zip(first_rows, spans, strict=True)],
        "scored_rows": [row for row, _ in scored],
        "scored_ids": [id for _, id in scored],
    }
    # One tensor, and on a GPU one copy, for all of them.
    numbers = torch.tensor(list(chain.from_iterable(lists.values())), dtype=torch.int64, device=device)
    tensors = dict(zip(lists, torch.split(numbers, [len(values) for values in lists.values()]), strict=True))
    return StepInput(
        **tensors,
        spans=tuple(
            StepSpan(row, span.tokens, span.sequence.slot(span.context), span.sequence.pages)
            for row, span in zip(first_rows, spans, strict=True)
        ),
        segments=_segments(spans, first_rows, device),
    )

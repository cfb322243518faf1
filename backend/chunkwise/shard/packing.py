"""Spans to one `StepInput`: the only place where request state becomes tensors."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import takewhile

import torch
from torch import Tensor

from chunkwise.core import KvFormat
from chunkwise.kv.cache import plan_gather
from chunkwise.kv.pages import PageRef
from chunkwise.model.step import DecodeRows, PrefillSpan, StepInput
from chunkwise.shard.scheduler import Span
from chunkwise_adapters.gate import GatedSpan, LoraSegment, build_segments

_PADDING = PageRef(KvFormat.FULL, 0)


def _decode_rows(spans: SequenceOf[Span], page_size: int, device: torch.device) -> tuple[DecodeRows, ...]:
    """One block per power of two of pages: padding to the longest table of all would make every short sequence pay for
    a long one."""
    groups: dict[int, list[int]] = {}
    for row, span in enumerate(spans):
        groups.setdefault((len(span.sequence.pages) - 1).bit_length(), []).append(row)
    return tuple(_decode_block(rows, spans, page_size, device) for rows in groups.values())


def _decode_block(rows: list[int], spans: SequenceOf[Span], page_size: int, device: torch.device) -> DecodeRows:
    tables = [spans[row].sequence.pages for row in rows]
    longest = max(len(table) for table in tables)
    pages = [page for table in tables for page in [*table, *[_PADDING] * (longest - len(table))]]
    contexts = torch.tensor([spans[row].context for row in rows], device=device)
    mask = torch.arange(longest * page_size, device=device)[None] < contexts[:, None]
    adjacent = rows[-1] - rows[0] + 1 == len(rows)
    where = slice(rows[0], rows[-1] + 1) if adjacent else torch.tensor(rows, device=device)
    return DecodeRows(where, len(rows), plan_gather(pages, device), mask, contexts)


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
            positions.append(position)
            slots.append(sequence.pages[position // page_size].number * page_size + position % page_size)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    # A prompt's single last token behind longer spans is a prefill span like any other.
    decoding = len(list(takewhile(lambda span: span.tokens == 1, spans)))
    scored = [pair for span, row in zip(spans, first_rows, strict=True) for pair in _scored(span, row)]
    return StepInput(
        ids=tensor(ids),
        positions=tensor(positions),
        slots=tensor(slots),
        last_rows=tensor([row + span.tokens - 1 for row, span in zip(first_rows, spans, strict=True)]),
        scored_rows=tensor([row for row, _ in scored]),
        scored_ids=tensor([id for _, id in scored]),
        decode=_decode_rows(spans[:decoding], page_size, device),
        prefill=tuple(
            PrefillSpan(row, span.tokens, span.context, plan_gather(span.sequence.pages, device))
            for row, span in zip(first_rows[decoding:], spans[decoding:], strict=True)
        ),
        segments=_segments(spans, first_rows, device),
    )

"""Times of tokens to the figures that are reported. Pure.

Streams that decoded together form a group; a group decodes from its last first token to its first last token, so that
neither prefill nor a thinning batch counts. ``decode_tok_s`` is all tokens of these windows over the windows' lengths.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from chunkwise.bench.runners.protocol import RunResult, StreamResult

Figures = dict[str, float | None]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0..1) of ``values`` lie, between neighbours by straight line."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class _Window:
    tokens: int
    ms: float
    streams: int


def _window(streams: Sequence[StreamResult]) -> _Window | None:
    """The time in which all streams of a group decode; None when there is none."""
    begin = max(stream.start_ms + stream.times_ms[0] for stream in streams)
    end = min(stream.start_ms + stream.times_ms[-1] for stream in streams)
    tokens = sum(begin < stream.start_ms + time <= end for stream in streams for time in stream.times_ms)
    return _Window(tokens, end - begin, len(streams)) if tokens and end > begin else None


def decode_rates(result: RunResult) -> tuple[float, float] | None:
    """Tokens per second over all groups, and milliseconds for one token of every stream; None if nothing overlapped."""
    windows = [_window([result.streams[index] for index in group]) for group in result.groups]
    known = [window for window in windows if window is not None]
    if len(known) < len(windows):
        return None
    per_second = 1000 * sum(w.tokens for w in known) / sum(w.ms for w in known)
    return per_second, 1000 * len(result.streams) / per_second


def gaps(result: RunResult) -> list[float]:
    """Milliseconds between the tokens of each stream, all streams together."""
    return [b - a for stream in result.streams for a, b in pairwise(stream.times_ms)]


def summarise(rounds: Sequence[RunResult]) -> Figures:
    """Figures of one case on one engine: rates are medians over rounds; times to the first token and gaps are
    percentiles over all streams of all rounds."""
    firsts = [stream.times_ms[0] for result in rounds for stream in result.streams]
    between = [gap for result in rounds for gap in gaps(result)]
    rates = [rate for rate in map(decode_rates, rounds) if rate is not None]
    spans = [max(s.start_ms + s.times_ms[-1] for s in result.streams) for result in rounds]
    totals = [1000 * sum(len(s.ids) for s in result.streams) / span for result, span in zip(rounds, spans, strict=True)]
    ranks = [s.mean_rank for result in rounds for s in result.streams if s.mean_rank is not None]
    figures: Figures = {
        "ttft_ms": percentile(firsts, 0.5),
        "gap_ms": percentile(between, 0.5) if between else None,
        "step_ms": statistics.median(rate[1] for rate in rates) if rates else None,
        "decode_tok_s": statistics.median(rate[0] for rate in rates) if rates else None,
        "total_tok_s": statistics.median(totals),
        "mean_rank": statistics.mean(ranks) if ranks else None,
    }
    for share in (0.9, 0.99):
        figures[f"ttft_p{share * 100:.0f}_ms"] = percentile(firsts, share)
        figures[f"gap_p{share * 100:.0f}_ms"] = percentile(between, share) if between else None
    return figures | _server_figures(rounds)


def _server_figures(rounds: Sequence[RunResult]) -> Figures:
    names = {name for result in rounds for name in result.server}
    return {
        f"server_{name}": statistics.median(result.server[name] for result in rounds if name in result.server)
        for name in sorted(names)
    }


def merge(results: Sequence[RunResult]) -> RunResult:
    """Streams asked for one by one, as one result, each a group of its own that starts when the last one ended."""
    streams: list[StreamResult] = []
    begin = 0.0
    for stream in (stream for result in results for stream in result.streams):
        streams.append(replace(stream, start_ms=begin))
        begin += stream.times_ms[-1]
    return RunResult(streams, [[index] for index in range(len(streams))], {})


def agreement(reference: RunResult, other: RunResult) -> float:
    """Share of the reference's tokens that the other engine gave too, counted up to each stream's first difference."""
    same = total = 0
    for left, right in zip(reference.streams, other.streams, strict=True):
        total += len(left.ids)
        for a, b in zip(left.ids, right.ids, strict=False):
            if a != b:
                break
            same += 1
    return same / total

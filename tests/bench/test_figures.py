"""Figures of runs whose times are written down by hand."""

from __future__ import annotations

import numpy as np
import pytest

from chunkwise.bench.figures import agreement, decode_rates, merge, percentile, summarise
from chunkwise.bench.runners.protocol import RunResult, StreamResult


def stream(*times: float, start: float = 0.0, rank: float | None = None, ids: list[int] | None = None) -> StreamResult:
    return StreamResult(list(times), ids or list(range(len(times))), start, rank)


def together(*streams: StreamResult, server: dict[str, float] | None = None) -> RunResult:
    return RunResult(list(streams), [list(range(len(streams)))], server or {})


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_percentiles_are_numpys(share: float) -> None:
    values = list(np.random.default_rng(0).normal(size=37))
    assert percentile(values, share) == pytest.approx(np.quantile(values, share))
    assert percentile([3.0], share) == 3.0


def test_one_stream_decodes_from_its_first_token_to_its_last() -> None:
    """Four tokens 10 ms apart after a prefill of a second: three tokens in 30 ms."""
    rates = decode_rates(together(stream(1000, 1010, 1020, 1030)))
    assert rates == pytest.approx((100.0, 10.0))


def test_a_batch_decodes_while_all_its_streams_do() -> None:
    """The second stream starts late and the first ends early: only 20..40 counts, with two tokens of each."""
    result = together(stream(0, 10, 20, 30, 40), stream(0, 10, 20, 30, 40, start=20))
    rates = decode_rates(result)
    assert rates == pytest.approx((1000 * 4 / 20, 10.0))


def test_groups_that_run_in_turn_add_up() -> None:
    """Two streams in turn, 10 and 30 ms a token: two tokens, one of each, cost 40 ms, the pause between not counted."""
    result = RunResult([stream(0, 10, 20), stream(500, 530, 560)], [[0], [1]], {})
    assert decode_rates(result) == pytest.approx((1000 * 4 / 80, 40.0))


def test_streams_that_never_overlap_have_no_rate() -> None:
    assert decode_rates(together(stream(0, 10), stream(0, 10, start=50))) is None
    assert summarise([together(stream(0, 10), stream(0, 10, start=50))])["decode_tok_s"] is None


def test_a_summary_takes_medians_over_rounds() -> None:
    rounds = [together(stream(100, 100 + gap, 100 + 2 * gap, rank=8.0), server={"x": gap}) for gap in (10, 20, 500)]
    figures = summarise(rounds)
    assert figures["ttft_ms"] == 100
    assert figures["gap_ms"] == 20
    assert figures["step_ms"] == pytest.approx(20)
    assert figures["decode_tok_s"] == pytest.approx(50)
    assert figures["total_tok_s"] == pytest.approx(1000 * 3 / 140)
    assert figures["mean_rank"] == 8.0
    assert figures["server_x"] == 20


def test_a_rank_that_nobody_reports_is_absent() -> None:
    assert summarise([together(stream(1, 2))])["mean_rank"] is None


def test_streams_asked_one_by_one_are_their_own_groups() -> None:
    merged = merge([together(stream(1, 2)), together(stream(3, 5))])
    assert merged.groups == [[0], [1]]
    assert [s.start_ms for s in merged.streams] == [0, 2]
    assert summarise([merged])["total_tok_s"] == pytest.approx(1000 * 4 / 7)
    assert [s.times_ms for s in merged.streams] == [[1, 2], [3, 5]]


def test_agreement_counts_up_to_the_first_difference() -> None:
    left = together(stream(1, 2, 3, 4, ids=[1, 2, 3, 4]), stream(1, 2, ids=[5, 6]))
    right = together(stream(1, 2, 3, 4, ids=[1, 2, 9, 4]), stream(1, 2, ids=[5, 6]))
    assert agreement(left, left) == 1.0
    assert agreement(left, right) == pytest.approx(4 / 6)

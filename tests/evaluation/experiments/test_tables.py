from __future__ import annotations

import math

from chunkwise.evaluation.bootstrap import Interval
from chunkwise.evaluation.experiments.tables import Table

TABLE = Table(
    "t",
    "A title",
    ("arm", "rank", "count", "value"),
    [
        ("plain, uniform", 0.25, 1234567, Interval(29.95912345, 27.1, 33.0)),
        ("none", math.nan, None, None),
        ("undefined", 16.0, 0, Interval(math.nan, math.nan, math.nan)),
    ],
)


def test_csv_spreads_intervals_over_three_columns() -> None:
    assert TABLE.csv().splitlines() == [
        "arm,rank,count,value,value low,value high",
        '"plain, uniform",0.25,1234567,29.9591,27.1,33',
        "none,,,,,",
        "undefined,16,0,,,",
    ]


def test_markdown_puts_bounds_in_brackets() -> None:
    assert TABLE.markdown().splitlines() == [
        "**A title**",
        "",
        "| arm | rank | count | value |",
        "| --- | --- | --- | --- |",
        "| plain, uniform | 0.25 | 1234567 | 29.96 [27.1, 33] |",
        "| none |  |  |  |",
        "| undefined | 16 | 0 |  |",
    ]

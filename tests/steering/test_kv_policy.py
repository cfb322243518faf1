from __future__ import annotations

import pytest

from chunkwise.config.policy import KvPolicy
from chunkwise.core import KvFormat, KvScorer
from chunkwise.steering.kv_policy import KvChoice, kv_rule


@pytest.mark.parametrize(
    ("policy", "choice"),
    [
        (KvPolicy(kind="full"), KvChoice()),
        (KvPolicy(kind="int8"), KvChoice(KvFormat.INT8)),
        (KvPolicy(kind="int4", keep_percent=10), KvChoice(KvFormat.INT4)),
        (KvPolicy(kind="keep", keep_percent=30), KvChoice(KvFormat.FULL, 70)),
        (
            KvPolicy(kind="keep", keep_percent=25, kept_format="int8", scorer="key_diversity"),
            KvChoice(KvFormat.INT8, 75, KvScorer.KEY_DIVERSITY),
        ),
        (KvPolicy(kind="window"), KvChoice(KvFormat.FULL, 100)),
    ],
)
def test_all_kinds_but_one_treat_every_chunk_alike(policy: KvPolicy, choice: KvChoice) -> None:
    assert {kv_rule(policy).choose(complexity) for complexity in (0.0, 0.39, 0.4, 0.6, 1.0)} == {choice}
    assert choice.changes == (policy.kind != "full")


def test_by_complexity_easy_chunks_shrink_most_and_hard_ones_stay_full() -> None:
    policy = KvPolicy(easy_below=0.3, hard_above=0.7, easy_drop_percent=40, scorer="key_diversity")
    easy = KvChoice(KvFormat.INT4, 40, KvScorer.KEY_DIVERSITY)
    chosen = [kv_rule(policy).choose(complexity) for complexity in (0.0, 0.29, 0.3, 0.69, 0.7, 1.0)]
    assert chosen == [easy, easy, KvChoice(KvFormat.INT8), KvChoice(KvFormat.INT8), KvChoice(), KvChoice()]


def test_with_equal_bounds_no_chunk_is_in_between() -> None:
    rule = kv_rule(KvPolicy(easy_below=0.5, hard_above=0.5, easy_format="int8"))
    assert [rule.choose(complexity).format for complexity in (0.49, 0.5)] == [KvFormat.INT8, KvFormat.FULL]

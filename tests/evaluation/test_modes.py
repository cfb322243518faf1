from __future__ import annotations

from pathlib import Path

import pytest

from chunkwise.config.policy import InvalidPolicy
from chunkwise.core import AdapterInfo
from chunkwise.evaluation.modes import BASE, InvalidMode, parse_mode
from chunkwise.steering.plans import make_plan

ADAPTER = AdapterInfo("a", "hash", 12, (0, 0.25, 1, 2, 12), (0.0, 0.5, 0.7, 0.9, 1.0), (0.0, 0.25, 1.0, 2.0, 12.0))


@pytest.mark.parametrize("rung", ADAPTER.rungs)
def test_a_fixed_rung_holds_for_prompt_and_answer(rung: float) -> None:
    mode = parse_mode(f"rung={rung}", ADAPTER)
    assert mode.policy is not None and mode.name == f"rung={rung}"
    plan = make_plan(mode.policy, ADAPTER)
    assert plan is not None
    ((start, choice),) = plan.chunks([1, 2, 3])
    assert (start, choice.rung, choice.scale) == (0, rung, 1.0)
    assert (mode.policy.rank.crossfade, mode.policy.kv.kind) == (0, "full")


def test_modes_by_name(tmp_path: Path) -> None:
    policy = tmp_path / "p.toml"
    policy.write_text("[rank]\nmin_rank = 3\n")
    assert parse_mode("base", ADAPTER) is BASE
    assert (parse_mode("full", ADAPTER).adapter, parse_mode("full", ADAPTER).policy) == ("a", None)
    adaptive = parse_mode(f"policy={policy}", ADAPTER)
    assert adaptive.adapter == "a"
    assert adaptive.policy is not None and adaptive.policy.rank.min_rank == 3
    assert parse_mode(f"policy={policy}", None).adapter is None


@pytest.mark.parametrize(
    "text",
    ["", "rung", "rung=", "rung=-1", "rung=x", "rung=nan", "rung=inf", "policy", "policy=", "adaptive", "full=1"],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(InvalidMode, match="use base, full, rung=K or policy=FILE"):
        parse_mode(text, ADAPTER)


def test_what_does_not_fit_the_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidMode, match=r"no rung 3; its rungs are \(0, 0\.25, 1, 2, 12\)"):
        parse_mode("rung=3", ADAPTER)
    for text in ("full", "rung=1"):
        with pytest.raises(InvalidMode, match="needs an adapter"):
            parse_mode(text, None)
    with pytest.raises(InvalidPolicy, match="cannot be read"):
        parse_mode(f"policy={tmp_path / 'none.toml'}", ADAPTER)

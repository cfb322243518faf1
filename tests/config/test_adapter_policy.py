from __future__ import annotations

import pytest

from chunkwise.config.policy import InvalidPolicy, parse_policy

FIXED = """
[chunker]
min_length = 8
[adapters."my adapter"]
content_hash = "h"
rungs = [0, 0.25, 2]
kept_energy = [0, 0.5, 1]
answer_rung = 2.0
prompt_rung = 0.25
"""
PRICED = (
    FIXED.replace("prompt_rung = 0.25", "price_per_rank = 0.01\nscales = [1, 1.5, 1.2]")
    + """
[adapters."my adapter".prices]
default = [0.5, 0.1, 0]
tokens = [
  [198, 0.9, 0.2, 0.0], # "\\n"
]
"""
)


def test_a_section_with_a_fixed_prompt_rung() -> None:
    section = parse_policy(FIXED).adapters["my adapter"]
    assert (section.content_hash, section.rungs, section.kept_energy) == ("h", (0, 0.25, 2), (0.0, 0.5, 1.0))
    assert (section.prompt_rung, section.answer_rung, section.prices, section.scales) == (0.25, 2, None, None)
    assert f"{section.rungs} {section.answer_rung}" == "(0, 0.25, 2) 2"


def test_a_section_with_prices() -> None:
    section = parse_policy(PRICED).adapters["my adapter"]
    assert section.prices is not None and section.min_length is None
    assert (section.prompt_rung, section.price_per_rank, section.scales) == (None, 0.01, (1.0, 1.5, 1.2))
    assert (section.prices.default, section.prices.tokens) == ((0.5, 0.1, 0.0), {198: (0.9, 0.2, 0.0)})


def test_answer_tokens_have_rungs_of_their_own() -> None:
    section = parse_policy(FIXED + "answer_tokens = [[5, 0], [7, 0.25], [9, 2.0]]").adapters["my adapter"]
    assert section.answer_tokens == {5: 0, 7: 0.25, 9: 2}
    for row, message in (("[5, 3]", r"rungs \[3\]; each"), ("[5]", "row"), ("[5, 0], [5, 2]", "two rows")):
        with pytest.raises(InvalidPolicy, match=f"answer_tokens has? .*{message}|answer_tokens have the {message}"):
            parse_policy(FIXED + f"answer_tokens = [{row}]")
    with pytest.raises(InvalidPolicy, match="one scale for all rungs"):
        parse_policy(FIXED + "answer_tokens = [[5, 0]]\nscales = [1, 2, 1]")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('content_hash = "h"', "", r"\['content_hash'\] are missing"),
        ('content_hash = "h"', "content_hash = 5", "content_hash is 5"),
        ('content_hash = "h"', 'content_hash = "h"\nrank = 3', r"unknown keys \['rank'\]"),
        ("rungs = [0, 0.25, 2]", "rungs = [0, 2, 0.25]", "must ascend"),
        ("rungs = [0, 0.25, 2]", "rungs = 4", "rungs is 4; a list"),
        ("rungs = [0, 0.25, 2]", "rungs = [0, true, 2]", "rungs holds True"),
        ("kept_energy = [0, 0.5, 1]", "kept_energy = [0, 1]", "kept_energy has 2 numbers for 3 rungs"),
        ("answer_rung = 2.0", "answer_rung = 3", r"answer_rung is 3; it must be one of \(0, 0\.25, 2\)"),
        ("answer_rung = 2.0", "answer_rung = 2\nprompt_rung = 0", "either prompt_rung or prices"),
        ("price_per_rank = 0.01", "min_length = 0", "min_length is 0"),
        ("price_per_rank = 0.01", "min_length = 1.5", "min_length is 1\\.5"),
        ("price_per_rank = 0.01", "price_per_rank = -1", "price_per_rank is -1.0"),
        ("scales = [1, 1.5, 1.2]", "scales = [1, 1.5]", "scales has 2 numbers"),
        ("scales = [1, 1.5, 1.2]", "scales = [1, 1.5, inf]", "scales are"),
        ("default = [0.5, 0.1, 0]", "default = [0.5, 0.1]", "the row .* 2 numbers"),
        ("default = [0.5, 0.1, 0]", "default = [0.5, 0.1, nan]", "prices of default"),
        ("default = [0.5, 0.1, 0]", "", r"\['default'\] are missing"),
        ("[198, 0.9, 0.2, 0.0]", "[198, 0.9, 0.2]", "the row .* 3 numbers"),
        ("[198, 0.9, 0.2, 0.0]", "[-1, 0.9, 0.2, 0.0]", "the row"),
        ("[198, 0.9, 0.2, 0.0]", "[198, 0.9, 0.2, 0.0], [198, 1, 1, 1]", "two rows for token 198"),
    ],
)
def test_what_a_section_cannot_be_is_named(old: str, new: str, message: str) -> None:
    assert old in PRICED
    with pytest.raises(InvalidPolicy, match=rf'policy\.adapters\."my adapter": .*({message}).*chunkwise calibrate'):
        parse_policy(PRICED.replace(old, new, 1))


def test_a_prompt_needs_a_rank() -> None:
    with pytest.raises(InvalidPolicy, match="either prompt_rung or prices"):
        parse_policy(FIXED.replace("prompt_rung = 0.25", ""))
    with pytest.raises(InvalidPolicy, match=r"policy\.adapters is 4; a table"):
        parse_policy("adapters = 4")

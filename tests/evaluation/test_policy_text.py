from __future__ import annotations

from chunkwise.config.adapter_policy import AdapterPolicy, PriceTable
from chunkwise.config.policy import parse_policy
from chunkwise.evaluation.policy_text import section_text

PRICES = PriceTable((0.5, 0.25, 0.0), {7: (1e-05, 0.0, 0.0), 198: (2.0, 1.0, 0.0), 3: (0.1, 0.0, 0.0)})
PRICED = AdapterPolicy(
    "h", (0, 0.25, 2), (0.0, 0.3, 1.0), 2, price_per_rank=1e-7, min_length=3, scales=(1.0, 1.5, 1.0), prices=PRICES
)
FIXED = AdapterPolicy("h", (0, 0.25, 2), (0.0, 0.3, 1.0), 2, prompt_rung=0.25, answer_tokens={7: 0, 3: 0.25})
TEXTS = {7: "\n", 198: '"\\\x7f\u2028', 3: "é # ]"}


def test_sections_read_back_the_same_and_stand_beside_each_other() -> None:
    text = section_text('a "b".c', PRICED, ["measured", ""], TEXTS.__getitem__) + "\n"
    text += section_text("d", FIXED, [], TEXTS.__getitem__)
    assert parse_policy(text).adapters == {'a "b".c': PRICED, "d": FIXED}
    assert parse_policy(f'[kv]\nkind = "full"\n{text}').kv.kind == "full"


def test_rows_say_which_token_they_are_for() -> None:
    text = section_text("a", PRICED, ["measured"], TEXTS.__getitem__)
    assert text.startswith('# measured\n[adapters."a"]\n')
    assert '  [7, 1e-05, 0.0, 0.0],  # "\\n"\n' in text and "rungs = [0, 0.25, 2]" in text

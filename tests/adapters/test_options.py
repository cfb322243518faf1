import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from chunkwise_adapters.format import BrokenAdapter, UnsupportedAdapter
from chunkwise_adapters.options import parse_options

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
PATH = "model.layers.3.self_attn.q_proj"


def test_scale_is_alpha_over_rank() -> None:
    assert parse_options(PLAIN, "a").rank_and_scale(PATH) == (8, 2.0)


def test_scale_is_alpha_over_root_of_rank_when_rank_stabilised() -> None:
    assert parse_options({**PLAIN, "use_rslora": True}, "a").rank_and_scale(PATH) == (8, 16 / math.sqrt(8))


def test_patterns_override_rank_and_alpha_apart() -> None:
    options = parse_options({**PLAIN, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.3.*": 2}}, "a")
    assert options.rank_and_scale(PATH) == (4, 0.5)
    assert options.rank_and_scale("model.layers.3.self_attn.k_proj") == (8, 0.25)
    assert options.rank_and_scale("model.layers.4.self_attn.q_proj") == (4, 4.0)


_keys = st.sampled_from(
    [
        "q_proj",
        "proj",
        "_proj",
        ".*proj",
        "k_proj|q_proj",
        "self_attn",
        "model",
        "3.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.3.self_attn.q_proj",
        "^model.layers.3.self_attn.q_proj",
        r"layers\.[0-3]\..*",
        PATH,
    ]
)


@given(keys=st.lists(_keys, unique=True), layer=st.integers(0, 12), target=st.sampled_from(["q_proj", "k_proj"]))
def test_patterns_match_as_in_peft(keys: list[str], layer: int, target: str) -> None:
    path = f"model.layers.{layer}.self_attn.{target}"
    pattern = {key: 10 + i for i, key in enumerate(keys)}
    expected = pattern.get(get_pattern_key(list(pattern), path), 8)
    assert parse_options({**PLAIN, "rank_pattern": pattern}, "a").rank_and_scale(path)[0] == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [0]}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", [5, 6]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 8}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of_next_year"),
        ("option_of_next_year", "on"),
    ],
)
def test_options_that_change_the_computation_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(UnsupportedAdapter, match=option):
        parse_options({**PLAIN, option: value}, "a")


@pytest.mark.parametrize("missing", ["use_dora", "modules_to_save", "layer_replication", "option_of_next_year"])
@pytest.mark.parametrize("inactive", [None, False, [], {}, 0, ""])
def test_inactive_options_are_accepted(missing: str, inactive: Any) -> None:
    assert parse_options({**PLAIN, missing: inactive}, "a").rank == 8


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lora_dropout", 0.1),
        ("init_lora_weights", True),
        ("init_lora_weights", False),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "orthogonal"),
        ("loftq_config", {"loftq_bits": 4}),
        ("target_modules", ["q_proj"]),
        ("target_modules", ".*q_proj"),
        ("target_modules", "all-linear"),
        ("layers_to_transform", [0, 1]),
        ("task_type", "CAUSAL_LM"),
        ("rank_pattern", None),
    ],
)
def test_options_without_effect_on_the_computation_are_accepted(option: str, value: Any) -> None:
    assert parse_options({**PLAIN, option: value}, "a").rank_and_scale(PATH) == (8, 2.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", None),
        ("r", 0),
        ("r", True),
        ("r", 4.0),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", None),
        ("use_rslora", "yes"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"q_proj": "8"}),
    ],
)
def test_malformed_values_are_broken(option: str, value: Any) -> None:
    with pytest.raises(BrokenAdapter, match=option):
        parse_options({**PLAIN, option: value}, "a")


def test_config_that_is_no_object_is_broken() -> None:
    with pytest.raises(BrokenAdapter, match="list"):
        parse_options([], "a")

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from chunkwise.config.settings import Limits
from chunkwise.core import Grammar, InvalidRequest, UnknownAdapter
from chunkwise.router.api.schema import GenerateBody, GenerateParameters
from chunkwise.router.api.validation import Validator
from chunkwise.tokenizer import Tokenizer
from fakes import ADAPTERS, LIMITS


@pytest.fixture(scope="session")
def validator(model_dir: Path) -> Validator:
    adapters = {adapter.adapter_id: adapter for adapter in ADAPTERS}
    return Validator(Limits(), LIMITS, Tokenizer(model_dir), adapters, lambda: 42)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 0}, r"`best_of` must be in 1\.\.2\. Given: 0"),
        ({"best_of": 3, "do_sample": True}, r"`best_of` must be in 1\.\.2\. Given: 3"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1. Given: 2"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` is > 1"),
        ({"temperature": 0.0}, r"`temperature` must be > 0\. Given: 0\.0"),
        ({"temperature": -1.0}, r"`temperature` must be > 0\. Given: -1\.0"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be > 0"),
        ({"frequency_penalty": 2.5}, r"`frequency_penalty` must be >= -2 and <= 2\. Given: 2\.5"),
        ({"frequency_penalty": -2.5}, "`frequency_penalty`"),
        ({"top_k": 0}, r"`top_k` must be > 0 and < 4294967296\. Given: 0"),
        ({"top_k": -4}, "`top_k` must be > 0"),
        ({"top_k": 2**32}, "`top_k` must be > 0"),
        ({"top_p": 0.0}, r"`top_p` must be > 0 and < 1\. Given: 0\.0"),
        ({"top_p": 1.0}, "`top_p` must be > 0 and < 1"),
        ({"typical_p": 1.5}, "`typical_p` must be > 0 and < 1"),
        ({"grammar": {"type": "json", "value": "{"}}, "`grammar` is not valid JSON: .*Given: {; correct it"),
        ({"grammar": {"type": "json", "value": "7"}}, "`grammar` must be a JSON schema with `properties`. Given: 7"),
        ({"grammar": {"type": "json", "value": "[" * 9000}}, "`grammar` is not valid JSON"),
        ({"grammar": {"type": "json_object", "value": {"type": "object"}}}, "schema with `properties`"),
        ({"grammar": {"type": "json", "value": {"properties": ["a"]}}}, "schema with `properties`"),
        ({"grammar": {"type": "json", "value": {"properties": {"a": {"const": float("nan")}}}}}, "not valid JSON"),
        ({"grammar": {"type": "json_schema", "value": {"name": "n", "schema": {}}}}, "schema with `properties`"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be > 0. Given: 0"),
        ({"max_new_tokens": 126}, r"must be <= 128\. Given: 3 `inputs` tokens and 126.*at most 125 new tokens"),
        ({"max_new_tokens": 5000}, r"must be <= 128\. Given: 3 `inputs` tokens and 5000"),
        ({"stop": ["a", "b", "c", "d", "e"]}, r"`stop` supports up to 4 stop sequences\. Given: 5"),
        ({"stop": [""]}, "`stop` must not hold an empty string"),
        ({"truncate": 0}, r"`truncate` must be > 0 and <= 100\. Given: 0"),
        ({"truncate": 101}, r"`truncate` must be > 0 and <= 100\. Given: 101"),
        ({"top_n_tokens": 6}, r"`top_n_tokens` must be >= 0 and <= 5\. Given: 6"),
    ],
)
async def test_a_broken_rule_names_value_and_limit(
    validator: Validator, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        await validator.validate("hi", GenerateParameters(**parameters), stream=False)
    # The Hub's client takes this phrase for a server that is not TGI.
    assert "model_kwargs" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` is not supported when streaming tokens"),
    ],
)
async def test_some_things_cannot_be_streamed(validator: Validator, parameters: dict[str, Any], message: str) -> None:
    assert await validator.validate("hi", GenerateParameters(**parameters), stream=False)
    with pytest.raises(InvalidRequest, match=message):
        await validator.validate("hi", GenerateParameters(**parameters), stream=True)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("", "`inputs` cannot be empty"),
        ("x" * 100, r"must have less than 101 tokens\. Given: 101; shorten the prompt or set `truncate` to 100"),
    ],
)
async def test_the_prompt_must_have_the_right_length(validator: Validator, inputs: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await validator.validate(inputs, GenerateParameters(), stream=False)


async def test_the_longest_prompt_is_accepted_and_truncation_makes_any_prompt_fit(validator: Validator) -> None:
    valid = await validator.validate("x" * 99, GenerateParameters(), stream=False)
    assert (valid.input_length, valid.generation.stopping.max_new_tokens) == (100, 28)
    valid = await validator.validate("x" * 9999, GenerateParameters(truncate=100), stream=False)
    assert valid.input_length == 100


SCHEMA = {"properties": {"b": {"enum": [None, "é"]}, "a": {}}, "type": "object"}


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ({"type": "regex", "value": "(a|é)+"}, Grammar("regex", "(a|é)+")),
        ({"type": "regex", "value": "("}, Grammar("regex", "(")),  # the shards know better
        ({"type": "regex", "value": ""}, None),
    ],
)
async def test_a_regex_reaches_the_shard_unchanged(
    validator: Validator, grammar: dict[str, Any], expected: Grammar | None
) -> None:
    request = (await validator.validate("hi", GenerateParameters(grammar=grammar), stream=False)).generation
    assert request.sampling.grammar == expected


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json", "value": json.dumps(SCHEMA)},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "thing", "schema": SCHEMA}},
        {"type": "json_schema", "value": {"schema": {"properties": SCHEMA["properties"]}}},
    ],
)
async def test_a_schema_may_be_given_in_all_of_tgis_ways(validator: Validator, grammar: dict[str, Any]) -> None:
    body = GenerateBody.model_validate_json(json.dumps({"inputs": "hi", "parameters": {"grammar": grammar}}))
    got = (await validator.validate("hi", body.parameters, stream=True)).generation.sampling.grammar
    assert got is not None
    assert got.kind == "json"
    assert json.loads(got.value) == SCHEMA
    assert list(json.loads(got.value)["properties"]) == ["b", "a"], "the order of an answer's properties"


async def test_grammars_can_be_switched_off(validator: Validator) -> None:
    strict = replace(validator, limits=Limits(disable_grammar_support=True))
    for grammar in ({"type": "regex", "value": "a"}, {"type": "json", "value": SCHEMA}):
        with pytest.raises(InvalidRequest, match="`grammar` is not supported by this server; leave it out"):
            await strict.validate("hi", GenerateParameters(grammar=grammar), stream=False)


@pytest.mark.parametrize(
    "grammar", ["a", {"value": "a"}, {"type": "regex"}, {"type": "xml", "value": "a"}, {"type": "regex", "value": {}}]
)
def test_a_grammar_of_another_shape_is_no_body(grammar: Any) -> None:
    with pytest.raises(ValidationError, match="grammar"):
        GenerateBody.model_validate({"inputs": "hi", "parameters": {"grammar": grammar}})


async def test_an_unknown_adapter_is_told_which_ones_there_are(validator: Validator) -> None:
    with pytest.raises(UnknownAdapter, match=r"`adapter_id` 'tax' is not resident\. Resident adapters: law, med"):
        await validator.validate("hi", GenerateParameters(adapter_id="tax"), stream=False)
    with pytest.raises(UnknownAdapter, match="Resident adapters: none"):
        await replace(validator, adapters={}).validate("hi", GenerateParameters(adapter_id="tax"), stream=False)


async def test_defaults_are_neutral(validator: Validator) -> None:
    request = (await validator.validate("hi", GenerateParameters(), stream=True)).generation
    assert not request.sampling.samples
    assert (request.sampling.repetition_penalty, request.sampling.frequency_penalty) == (1.0, 0.0)
    assert request.stopping.max_new_tokens == 125
    assert (request.adapter_id, request.top_n_tokens, request.chunk_len) == (None, 0, None)
    assert (request.sampling.watermark, request.sampling.grammar) == (False, None)
    assert request.sampling.seed == 42
    assert len(request.prompt_ids or ()) == 3


VALID = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.01, 5.0),
        "repetition_penalty": st.floats(0.01, 5.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "top_k": st.integers(1, 2**32 - 1),
        "top_p": st.floats(0.01, 0.99),
        "typical_p": st.floats(0.01, 0.99),
        "do_sample": st.booleans(),
        "max_new_tokens": st.integers(1, 125),
        "stop": st.lists(st.text(min_size=1), max_size=4),
        "truncate": st.integers(1, 100),
        "seed": st.integers(0, 2**64 - 1),
        "top_n_tokens": st.integers(0, 5),
        "watermark": st.booleans(),
        "adapter_id": st.sampled_from(["", "law", "med"]),
    },
)


@given(wanted=VALID)
async def test_every_valid_value_reaches_the_shard_unchanged(model_dir: Path, wanted: dict[str, Any]) -> None:
    adapters = {adapter.adapter_id: adapter for adapter in ADAPTERS}
    validator = Validator(Limits(), LIMITS, Tokenizer(model_dir), adapters, lambda: 42)
    request = (await validator.validate("hi", GenerateParameters(**wanted), stream=False)).generation
    sampling = request.sampling
    for name in ("temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p", "typical_p", "seed"):
        if name in wanted:
            assert getattr(sampling, name) == wanted[name]
    assert sampling.watermark == wanted.get("watermark", False)
    assert request.stopping.stop_sequences == tuple(wanted.get("stop", ()))
    assert request.stopping.max_new_tokens == wanted.get("max_new_tokens", 128 - len(request.prompt_ids or ()))
    assert request.adapter_id == (wanted.get("adapter_id") or None)
    assert sampling.samples == (
        wanted.get("do_sample", False)
        or wanted.get("temperature", 1.0) != 1.0
        or any(name in wanted for name in ("top_k", "top_p", "typical_p"))
    )


@given(nulls=st.sets(st.sampled_from(sorted(GenerateParameters.model_fields))))
def test_an_explicit_null_is_an_absent_key(nulls: set[str]) -> None:
    body = {"inputs": "hi", "parameters": dict.fromkeys(nulls), "stream": None, "unknown": None}
    assert GenerateBody.model_validate(body) == GenerateBody(inputs="hi", parameters=GenerateParameters())

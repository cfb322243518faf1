"""TGI's rules for a generate request, and the request that the loop takes. Messages name value, limit and remedy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chunkwise.config.settings import Limits
from chunkwise.core import (
    AdapterInfo,
    GenerationRequest,
    Grammar,
    InvalidRequest,
    SamplingParams,
    StoppingParams,
    UnknownAdapter,
    WarmupLimits,
)
from chunkwise.router.api.schema import GenerateParameters, GrammarBody, JsonSchemaGrammar, RegexGrammar
from chunkwise.tokenizer import Tokenizer

# TGI checks a longer wish as if it were this long, and ends the answer at max_total_tokens.
_CHECKED_NEW_TOKENS = 1024


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequest(message)


def _schema_text(value: dict[str, Any] | str) -> str:
    """The schema of an object as JSON. Its properties keep their order, which is that of the answer."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        _require(
            isinstance(schema, dict) and isinstance(schema.get("properties"), dict),
            f"`grammar` must be a JSON schema with `properties`. Given: {value!s:.100}; describe an object",
        )
        # By the letter, a schema that names no type admits numbers and strings too; who lists properties means objects.
        return json.dumps({"type": "object", **schema}, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"`grammar` is not valid JSON: {error}. Given: {value!s:.100}; correct it") from error


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request that may be submitted ``best_of`` times. ``generation.id`` has no meaning yet."""

    generation: GenerationRequest
    best_of: int

    @property
    def input_length(self) -> int:
        """Prompt tokens."""
        return len(self.generation.prompt_ids or ())


@dataclass(frozen=True, slots=True)
class Validator:
    """Checks requests against the server's limits; ``draw_seed`` returns a random 64-bit number."""

    limits: Limits
    agreed: WarmupLimits
    tokenizer: Tokenizer
    adapters: Mapping[str, AdapterInfo]
    draw_seed: Callable[[], int]

    async def validate(
        self, inputs: str, parameters: GenerateParameters, *, stream: bool, add_special_tokens: bool = True
    ) -> ValidRequest:
        """Validates and tokenises.

        Raises:
            InvalidRequest: a parameter or the prompt breaks a rule.
            UnknownAdapter: ``adapter_id`` names no resident adapter.
        """
        best_of = self._best_of(parameters, stream)
        sampling = self._sampling(parameters)
        self._check_rest(parameters, stream)
        adapter_id = self._adapter(parameters.adapter_id)
        _require(bool(inputs), "`inputs` cannot be empty; send at least one character")
        truncate = parameters.truncate or 0
        prompt_ids = await asyncio.to_thread(
            self.tokenizer.encode, inputs, add_special_tokens=add_special_tokens, truncate=truncate
        )
        max_new_tokens = self._max_new_tokens(len(prompt_ids), parameters.max_new_tokens)
        request = GenerationRequest(
            id=0,
            inputs=inputs,
            sampling=sampling,
            stopping=StoppingParams(max_new_tokens, tuple(parameters.stop)),
            prompt_ids=tuple(prompt_ids),
            truncate=truncate,
            add_special_tokens=add_special_tokens,
            adapter_id=adapter_id,
            top_n_tokens=parameters.top_n_tokens or 0,
            prefill_logprobs=parameters.decoder_input_details,
        )
        return ValidRequest(request, best_of)

    def _best_of(self, p: GenerateParameters, stream: bool) -> int:
        best_of = 1 if p.best_of is None else p.best_of
        limit = self.limits.max_best_of
        _require(1 <= best_of <= limit, f"`best_of` must be in 1..{limit}. Given: {best_of}; ask for fewer sequences")
        if best_of == 1:
            return 1
        warped = any(value is not None for value in (p.temperature, p.top_k, p.top_p, p.typical_p))
        _require(
            p.do_sample or warped,
            f"you must use sampling when `best_of` is > 1. Given: {best_of}; set `do_sample` to true",
        )
        _require(p.seed is None, f"`seed` must not be set when `best_of` is > 1. Given: {p.seed}; leave it out")
        _require(not stream, f"`best_of` != 1 is not supported when streaming tokens. Given: {best_of}; do not stream")
        return best_of

    def _sampling(self, p: GenerateParameters) -> SamplingParams:
        for name, value in (("temperature", p.temperature), ("repetition_penalty", p.repetition_penalty)):
            _require(value is None or value > 0, f"`{name}` must be > 0. Given: {value}; 1 is neutral")
        penalty = p.frequency_penalty
        _require(
            penalty is None or -2 <= penalty <= 2,
            f"`frequency_penalty` must be >= -2 and <= 2. Given: {penalty}; 0 is neutral",
        )
        _require(
            p.top_k is None or 0 < p.top_k < 2**32,
            f"`top_k` must be > 0 and < 4294967296. Given: {p.top_k}; leave it out to switch it off",
        )
        for name, value in (("top_p", p.top_p), ("typical_p", p.typical_p)):
            _require(
                value is None or 0 < value < 1,
                f"`{name}` must be > 0 and < 1. Given: {value}; leave it out to switch it off",
            )
        neutral = SamplingParams()
        return SamplingParams(
            temperature=neutral.temperature if p.temperature is None else p.temperature,
            top_k=p.top_k or neutral.top_k,
            top_p=neutral.top_p if p.top_p is None else p.top_p,
            typical_p=neutral.typical_p if p.typical_p is None else p.typical_p,
            do_sample=p.do_sample,
            seed=self.draw_seed() if p.seed is None else p.seed,
            repetition_penalty=neutral.repetition_penalty if p.repetition_penalty is None else p.repetition_penalty,
            frequency_penalty=neutral.frequency_penalty if penalty is None else penalty,
            watermark=p.watermark,
            grammar=None if p.grammar is None else self._grammar(p.grammar),
        )

    def _grammar(self, grammar: GrammarBody) -> Grammar | None:
        """The grammar as the shards take it; whether they can follow it is theirs to say. An empty one is none."""
        _require(not self.limits.disable_grammar_support, "`grammar` is not supported by this server; leave it out")
        if isinstance(grammar, RegexGrammar):
            return Grammar("regex", grammar.value) if grammar.value else None
        value = grammar.value.content if isinstance(grammar, JsonSchemaGrammar) else grammar.value
        return Grammar("json", _schema_text(value))

    def _check_rest(self, p: GenerateParameters, stream: bool) -> None:
        limits = self.limits
        _require(
            p.max_new_tokens != 0,
            "`max_new_tokens` must be > 0. Given: 0; leave it out for the longest possible answer",
        )
        _require(
            len(p.stop) <= limits.max_stop_sequences,
            f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {len(p.stop)}; name fewer",
        )
        _require("" not in p.stop, "`stop` must not hold an empty string; leave it out")
        longest = self.agreed.max_input_tokens
        _require(
            p.truncate is None or 1 <= p.truncate <= longest,
            f"`truncate` must be > 0 and <= {longest}. Given: {p.truncate}; leave it out to keep the whole prompt",
        )
        top_n = p.top_n_tokens or 0
        _require(
            top_n <= limits.max_top_n_tokens,
            f"`top_n_tokens` must be >= 0 and <= {limits.max_top_n_tokens}. Given: {top_n}; ask for fewer",
        )
        _require(
            not (p.decoder_input_details and stream),
            "`decoder_input_details` is not supported when streaming tokens. Given: true; leave it out",
        )

    def _adapter(self, adapter_id: str | None) -> str | None:
        if not adapter_id:
            return None
        if adapter_id not in self.adapters:
            resident = ", ".join(sorted(self.adapters)) or "none"
            raise UnknownAdapter(
                f"`adapter_id` {adapter_id!r} is not resident. Resident adapters: {resident}; "
                "name one of them, or leave it out for the base model"
            )
        return adapter_id

    def _max_new_tokens(self, input_length: int, wanted: int | None) -> int:
        agreed = self.agreed
        _require(input_length > 0, "`inputs` gives no tokens; send a longer prompt or a higher `truncate`")
        _require(
            input_length <= agreed.max_input_tokens,
            f"`inputs` must have less than {agreed.max_input_tokens + 1} tokens. Given: {input_length}; "
            f"shorten the prompt or set `truncate` to {agreed.max_input_tokens}",
        )
        room = agreed.max_total_tokens - input_length
        checked = min(wanted, _CHECKED_NEW_TOKENS) if wanted is not None else room
        _require(
            checked <= room,
            f"`inputs` tokens + `max_new_tokens` must be <= {agreed.max_total_tokens}. Given: {input_length} `inputs` "
            f"tokens and {wanted} `max_new_tokens`; ask for at most {room} new tokens",
        )
        return room if wanted is None else min(wanted, room)

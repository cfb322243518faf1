"""Grammars as masks over the next token; knows nothing of models or batches.

llguidance does the work: it needs no torch, takes regular expressions and JSON schemas, reports every fault as text,
and limits its work by count, not by time, so that tensor-parallel ranks agree. Of the alternatives, outlines-core
builds the whole automaton beforehand (minutes for ``.*a.{12}``), and xgrammar brings transformers and triton along.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from torch import Tensor

from chunkwise.core import Grammar, InvalidRequest

_MAX_CHARACTERS = 65_536
# A chain of n parts that may all be empty costs llguidance time and memory in the order of n^2 before it counts
# anything; 1500 of them are a second and 200 MB.
_MAX_OPTIONAL = 1500
_OPTIONAL = re.compile(r"[?*]|\{\s*0|\(\||\|\)|\|\||\(\)")
# Enough for a schema of 300 properties or a choice of 3000 words; a hostile grammar takes 0.1 s per token and 50 MB.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=50_000, step_lexer_fuel=100_000, max_lexer_states=100_000, verbose_errors=False
)
_REMEDIES = {
    "regex": "correct or simplify it (look-around, back-references and \\b are not implemented)",
    "json": "correct or simplify the schema",
}
_DEAD_END = "no token of this model leads to a match"
_SHOWN_CHARACTERS = 80


class GrammarState:
    """Where the answer of one request stands in its grammar."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self._grammar = grammar
        self._matcher = matcher

    def mask(self, scores: Tensor) -> Tensor:
        """Scores ``[V]`` with -inf for every token that may not come next. End of sequence may come exactly where the
        answer matches as it is; where nothing else may, it must.

        Raises:
            InvalidRequest: no token may come next, or finding out exceeds the limits.
        """
        allowed = self._allowed(scores.shape[-1])
        if not allowed.any():
            raise _refusal(self._grammar, _DEAD_END)
        return scores.masked_fill(~allowed.to(scores.device), -math.inf)

    def advance(self, id: int) -> None:
        """Takes the chosen token. Exceeded limits show in the next `mask`, if there is one."""
        self._matcher.consume_token(id)

    def _allowed(self, vocab: int) -> Tensor:
        """Which of the model's ids may come next, bool ``[vocab]``; the tokenizer may know fewer ids, or more."""
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[:vocab]
        if self._matcher.is_error():
            raise _refusal(self._grammar, _reason(self._matcher))
        allowed = torch.zeros(vocab, dtype=torch.bool)
        allowed[: len(bias)] = bias != 0
        return allowed


class GrammarCompiler:
    """Makes a `GrammarState` per request.

    Nothing compiled is kept: copies of a matcher share one lexer with its limits, so that one request could use up
    another's, and compiling takes but 1 to 15 ms. llguidance's own form of the tokenizer, some 50 MB for 49,152 tokens,
    is made with the first grammar, which takes a second longer. A tokenizer that llguidance cannot read is no error as
    long as no request has a grammar.
    """

    def __init__(self, model_dir: Path, eos_ids: Collection[int]) -> None:
        # Read now: later the file may be another, and not for all ranks.
        self._text = (model_dir / "tokenizer.json").read_text(encoding="utf-8")
        self._eos_ids = eos_ids

    @cached_property
    def _tokenizer(self) -> LLTokenizer | ValueError:
        try:
            return LLTokenizer(self._text, eos_token=sorted(self._eos_ids))
        except ValueError as error:
            return error

    def compile(self, grammar: Grammar) -> GrammarState:
        """The state of a new answer.

        Raises:
            InvalidRequest: the grammar is malformed, too large or too complex, uses what llguidance does not implement,
                or matches no text.
        """
        if isinstance(self._tokenizer, ValueError):
            raise InvalidRequest(f"this model serves no grammars ({self._tokenizer}); leave grammar out")
        matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            # Whether anything matches at all shows in the first mask.
            matcher.compute_logit_bias()
        if matcher.is_error():
            raise _refusal(grammar, _reason(matcher))
        return GrammarState(grammar, matcher)


def _source(grammar: Grammar) -> str:
    text = grammar.value
    if len(text) > _MAX_CHARACTERS:
        raise _refusal(grammar, f"it has {len(text)} characters, the limit is {_MAX_CHARACTERS}")
    optional = len(_OPTIONAL.findall(text)) if grammar.kind == "regex" else 0
    if optional > _MAX_OPTIONAL:
        raise _refusal(grammar, f"it has {optional} optional parts, the limit is {_MAX_OPTIONAL}")
    try:
        if grammar.kind == "regex":
            # \d, \w and \s in ASCII, as in JSON schemas: no dialect of regular expressions reads them more narrowly.
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'dws')}/")
        # As in TGI: one blank at most between JSON tokens, lest a model write blanks for ever; oneOf reads as anyOf.
        return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": "[ ]?", "coerce_one_of": True})
    except ValueError as error:
        raise _refusal(grammar, str(error)) from error


def _reason(matcher: LLMatcher) -> str:
    """The heart of llguidance's message, which quotes grammar and place around it."""
    message = matcher.get_error().rpartition("(in regex): ")[2]
    error = re.search(r"^error: (.+)$", message, re.MULTILINE)
    reason = error[1] if error else message.partition("\n")[0]
    return _DEAD_END if reason == "NoExtensionBias" else reason


def _refusal(grammar: Grammar, reason: str) -> InvalidRequest:
    shown = _shortened(grammar.value)
    return InvalidRequest(
        f"grammar ({grammar.kind}) {shown!r} cannot be used: {_shortened(reason)}; {_REMEDIES[grammar.kind]}"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"

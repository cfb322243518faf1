"""Answers to TGI's JSON. Pure. All keys are TGI's but those of `report_json`."""

from __future__ import annotations

import math
from typing import Any

from chunkwise.core import FinishReason, GeneratedText, Token
from chunkwise.router.answer import Ending, Event
from chunkwise.router.api.completion import Completion
from chunkwise.router.api.schema import GenerateParameters
from chunkwise.steering import SteeringReport

Json = dict[str, Any]

_FINISH = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "eos_token",
    FinishReason.STOP_SEQUENCE: "stop_sequence",
}


def token_json(token: Token) -> Json:
    """One token. A logprob that is no number has no JSON form and becomes null."""
    logprob = token.logprob if math.isfinite(token.logprob) else None
    return {"id": token.id, "text": token.text, "logprob": logprob, "special": token.special}


def _prefill_json(token: Token) -> Json:
    """One prompt token; TGI does not say here whether it is special."""
    return {key: value for key, value in token_json(token).items() if key != "special"}


def report_json(report: SteeringReport, text: GeneratedText) -> Json:
    """The opt-in keys of ``details``."""
    chunks = [
        {
            "start": c.start,
            "end": c.end,
            "rung": c.rung,
            "rank": c.rank,
            "scale": c.scale,
            "crossfade": c.crossfade,
            "complexity": c.complexity,
            "kv": c.kv.name.lower(),
            "kv_dropped": c.kv_dropped,
        }
        for c in report.chunks
    ]
    saved = text.kv_full_bytes - text.kv_bytes
    return {"chunks": chunks, "mean_rank": report.mean_rank, "kv_bytes": text.kv_bytes, "kv_bytes_saved": saved}


def wants_details(parameters: GenerateParameters) -> bool:
    """Whether an answer carries ``details``."""
    return parameters.details or parameters.decoder_input_details or parameters.chunk_details


def _ending_json(text: GeneratedText) -> Json:
    return {
        "finish_reason": _FINISH[text.finish_reason],
        "generated_tokens": text.generated_tokens,
        "seed": text.seed,
    }


def _sequence_json(completion: Completion) -> Json:
    body = _ending_json(completion.text)
    body |= {
        "prefill": [_prefill_json(token) for token in completion.prefill],
        "tokens": [token_json(token) for token in completion.tokens],
    }
    if completion.top_tokens:
        body["top_tokens"] = [[token_json(token) for token in top] for top in completion.top_tokens]
    return body


def completion_json(completions: tuple[Completion, ...], prompt: str, parameters: GenerateParameters) -> Json:
    """The body of ``/generate``: the first completion, and the others under ``best_of_sequences``."""
    prefix = prompt if parameters.return_full_text else ""
    best, *others = completions
    body: Json = {"generated_text": prefix + best.text.text}
    if wants_details(parameters):
        details = _sequence_json(best)
        if others:
            details["best_of_sequences"] = [
                {"generated_text": prefix + other.text.text, **_sequence_json(other)} for other in others
            ]
        if parameters.chunk_details:
            details |= report_json(best.report, best.text)
        body["details"] = details
    return body


def event_json(index: int, event: Event, prompt: str, input_length: int, parameters: GenerateParameters) -> Json:
    """One event of a stream; ``index`` counts from 1. The text and the details belong to the last event alone."""
    body: Json = {"index": index, "token": token_json(event.token)}
    if parameters.top_n_tokens:
        body["top_tokens"] = [token_json(token) for token in event.top_tokens]
    body |= {"generated_text": None, "details": None}
    if event.ending is not None:
        body["generated_text"] = (prompt if parameters.return_full_text else "") + event.ending.text.text
        if wants_details(parameters):
            body["details"] = _stream_details(event.ending, input_length, parameters)
    return body


def _stream_details(ending: Ending, input_length: int, parameters: GenerateParameters) -> Json:
    details = _ending_json(ending.text) | {"input_length": input_length}
    return details | report_json(ending.report, ending.text) if parameters.chunk_details else details

"""TGI's generate family: ``/``, ``/generate``, ``/generate_stream`` and ``/tokenize``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from chunkwise.core import InvalidRequest
from chunkwise.router.api.completion import Completion, collect, received, record
from chunkwise.router.api.errors import MalformedBody, WrongContentType
from chunkwise.router.api.results import completion_json, event_json
from chunkwise.router.api.schema import CompatBody, GenerateBody
from chunkwise.router.api.serving import SERVING, Serving
from chunkwise.router.api.sse import stream_events

_B = TypeVar("_B", bound=BaseModel)


async def read_body(request: web.Request, kind: type[_B]) -> _B:
    """The request's JSON body.

    Raises:
        WrongContentType: it is not declared as JSON.
        MalformedBody: it is not JSON.
        InvalidRequest: a key is missing or has the wrong type.
    """
    if request.content_type != "application/json":
        raise WrongContentType(f"Content-Type is {request.content_type!r}; send application/json")
    try:
        return kind.model_validate_json(await request.read())
    except web.RequestPayloadError as error:
        raise MalformedBody(f"the body is not what Content-Encoding says: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "json_invalid":
            raise MalformedBody(f"the body is not valid JSON: {first['msg']}") from error
        raise InvalidRequest(f"`{place or 'body'}`: {first['msg']}. Given: {first['input']!r:.100}") from error


async def generate(request: web.Request) -> web.StreamResponse:
    """``POST /generate``."""
    return await _complete(request.app[SERVING], await read_body(request, GenerateBody), listed=False)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """``POST /generate_stream``."""
    return await _stream(request, await read_body(request, GenerateBody))


async def compat_generate(request: web.Request) -> web.StreamResponse:
    """``POST /``: a stream if the body asks for one, else a list of one answer. The full text is the default here."""
    body = await read_body(request, CompatBody)
    if body.parameters.return_full_text is None:
        body = body.model_copy(update={"parameters": body.parameters.model_copy(update={"return_full_text": True})})
    return await _stream(request, body) if body.stream else await _complete(request.app[SERVING], body, listed=True)


async def tokenize(request: web.Request) -> web.Response:
    """``POST /tokenize``."""
    body = await read_body(request, GenerateBody)
    tokenizer = request.app[SERVING].validator.tokenizer

    def pieces() -> str:
        keys = ("id", "text", "start", "stop")
        return json.dumps([dict(zip(keys, piece, strict=True)) for piece in tokenizer.offsets(body.inputs)])

    return web.json_response(text=await asyncio.to_thread(pieces))


async def _complete(serving: Serving, body: GenerateBody, *, listed: bool) -> web.Response:
    async with received(serving, body.inputs, body.parameters, stream=False) as arrival:
        completions = await collect(serving, arrival)
        record(serving, completions[0].timings, completions[0].text)
    content = completion_json(completions, body.inputs, body.parameters)
    headers = _base_headers(serving, body) | _timing_headers(completions, arrival.valid.input_length)
    return web.json_response([content] if listed else content, headers=headers)


async def _stream(request: web.Request, body: GenerateBody) -> web.StreamResponse:
    serving = request.app[SERVING]
    return await stream_events(request, _events(serving, body), _base_headers(serving, body))


async def _events(serving: Serving, body: GenerateBody) -> AsyncGenerator[dict[str, Any], None]:
    parameters = body.parameters
    async with received(serving, body.inputs, parameters, stream=True) as arrival:
        answer = serving.loop.submit(arrival.valid.generation)
        try:
            index = 0
            async for event in answer:
                index += 1
                if event.ending is not None:
                    record(serving, arrival.timings(answer, serving.loop.clock()), event.ending.text)
                yield event_json(index, event, body.inputs, arrival.valid.input_length, parameters)
        finally:
            answer.cancel()


def _base_headers(serving: Serving, body: GenerateBody) -> dict[str, str]:
    headers = {"x-compute-type": serving.compute_type, "x-compute-characters": str(len(body.inputs))}
    adapter = body.parameters.adapter_id
    return headers | {"x-adapter-id": adapter} if adapter and adapter in serving.validator.adapters else headers


def _timing_headers(completions: tuple[Completion, ...], input_length: int) -> dict[str, str]:
    timings, generated = completions[0].timings, completions[0].text.generated_tokens

    def milliseconds(seconds: float) -> str:
        return str(int(seconds * 1000))

    return {
        "x-compute-time": str(timings.total),
        "x-total-time": milliseconds(timings.total),
        "x-validation-time": milliseconds(timings.validation),
        "x-queue-time": milliseconds(timings.queue),
        "x-inference-time": milliseconds(timings.inference),
        "x-time-per-token": milliseconds(timings.inference / max(1, generated)),
        "x-prompt-tokens": str(input_length),
        "x-generated-tokens": str(sum(completion.text.generated_tokens for completion in completions)),
    }

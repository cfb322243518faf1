"""Errors to HTTP: every error body is JSON with a string ``error`` and an ``error_type``, as TGI's clients expect."""

from __future__ import annotations

import logging
from typing import TypedDict

from aiohttp import web
from aiohttp.typedefs import Handler

from chunkwise.core import ChunkwiseError, GenerationFailed, InvalidRequest, Overloaded, UnknownAdapter
from chunkwise.router.loop import ServingStopped

_log = logging.getLogger(__name__)


class MalformedBody(InvalidRequest):
    """A request body that is not JSON."""


class WrongContentType(InvalidRequest):
    """A request body that does not say it is JSON."""


class Unauthorized(ChunkwiseError):
    """A request without the key that the server was started with."""


class Unhealthy(ChunkwiseError):
    """The server cannot generate at this moment."""


class ErrorBody(TypedDict):
    """The JSON of an error."""

    error: str
    error_type: str


# The first class that fits decides: subclasses come before their bases.
_KINDS: tuple[tuple[type[ChunkwiseError], int, str, str], ...] = (
    (MalformedBody, 400, "validation", "Input validation error: "),
    (WrongContentType, 415, "validation", "Input validation error: "),
    (UnknownAdapter, 404, "validation", "Input validation error: "),
    (InvalidRequest, 422, "validation", "Input validation error: "),
    (Unauthorized, 401, "unauthorized", ""),
    (Overloaded, 429, "overloaded", "Model is overloaded: "),
    (Unhealthy, 503, "healthcheck", ""),
    (ServingStopped, 503, "generation", "Request failed during generation: "),
    (GenerationFailed, 424, "generation", "Request failed during generation: "),
    (ChunkwiseError, 500, "internal", ""),
)
_HTTP_KINDS = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


def describe_error(error: Exception) -> tuple[int, ErrorBody]:
    """Status and body of an error. One that was not raised on purpose is logged and named to nobody."""
    for kind, status, error_type, prefix in _KINDS:
        if isinstance(error, kind):
            return status, {"error": f"{prefix}{error}", "error_type": error_type}
    _log.error("a request ended in an unexpected error", exc_info=error)
    return 500, {"error": "internal error; the server's log has the cause", "error_type": "internal"}


def _http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    text = {
        404: f"no route {request.path}",
        405: f"{request.path} does not answer {request.method}; use {error.headers.get('Allow', 'another method')}",
        413: f"{error.text}; send a shorter body or start the server with a higher payload limit",
    }.get(error.status, error.reason)
    body = ErrorBody(error=text, error_type=_HTTP_KINDS.get(error.status, "http"))
    allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    return web.json_response(body, status=error.status, headers=allow)


@web.middleware
async def json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers every error in JSON, those of aiohttp itself included."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _http_error(request, error)
    except ConnectionResetError:
        raise
    except Exception as error:
        status, body = describe_error(error)
        return web.json_response(body, status=status)

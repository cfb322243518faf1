"""The aiohttp application: routes, the key that guards some of them, and the size limit of bodies."""

from __future__ import annotations

import hmac

from aiohttp import web
from aiohttp.typedefs import Handler

from chunkwise.router.api import status, tgi
from chunkwise.router.api.errors import Unauthorized, json_errors
from chunkwise.router.api.serving import SERVING, Serving


def _same(given: str, expected: str) -> bool:
    # A header may hold bytes that are no UTF-8; aiohttp keeps them as surrogates.
    return hmac.compare_digest(*(text.lower().encode(errors="surrogateescape") for text in (given, expected)))


def guarded(handler: Handler) -> Handler:
    """The handler behind the server's key, if the server has one (compared case-insensitively, as in TGI)."""

    async def check_key(request: web.Request) -> web.StreamResponse:
        key = request.app[SERVING].settings.api_key
        given = request.headers.get("Authorization", "")
        if key is not None and not _same(given, f"Bearer {key}"):
            raise Unauthorized("the API key is missing or wrong; send the header Authorization: Bearer <key>")
        return await handler(request)

    return check_key


async def _finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Lets pages of any origin read the answer, as TGI does by default, and ends kept-alive connections of a server
    that is shutting down."""
    response.headers.setdefault("Access-Control-Allow-Origin", "*")
    if request.app[SERVING].loop.stopped is not None:
        response.force_close()
        response.headers["Connection"] = "close"


@web.middleware
async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers a browser's question whether it may POST here; everything else goes on."""
    if request.method != "OPTIONS":
        return await handler(request)
    headers = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": "content-type, authorization",
    }
    return web.Response(headers=headers)


def build_app(serving: Serving) -> web.Application:
    """The application. Run it with ``handler_cancellation``: that is how a client that goes away leaves the batch."""
    app = web.Application(middlewares=[preflight, json_errors], client_max_size=serving.settings.limits.payload_limit)
    app[SERVING] = serving
    app.on_response_prepare.append(_finish_headers)
    app.add_routes(
        [
            web.post("/", guarded(tgi.compat_generate)),
            web.post("/generate", guarded(tgi.generate)),
            web.post("/generate_stream", guarded(tgi.generate_stream)),
            web.post("/tokenize", guarded(tgi.tokenize)),
            web.get("/", status.health),
            web.get("/health", status.health),
            web.get("/ping", status.health),
            web.get("/info", status.info),
            web.get("/v1/models", status.models),
            web.get("/metrics", status.metrics),
        ]
    )
    return app

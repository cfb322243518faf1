"""What a router says of itself: health, info, models and metrics."""

from __future__ import annotations

import logging

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from chunkwise import __version__
from chunkwise.core import GenerationFailed
from chunkwise.router.api.errors import Unhealthy
from chunkwise.router.api.serving import SERVING

_log = logging.getLogger(__name__)


async def health(request: web.Request) -> web.Response:
    """``GET /health``, ``/ping`` and ``/``: an empty 200 when the loop runs and every shard answers."""
    serving = request.app[SERVING]
    if serving.loop.stopped is not None:
        raise Unhealthy(f"unhealthy: {serving.loop.stopped}")
    try:
        await serving.shards.health()
    except GenerationFailed as error:
        raise Unhealthy(f"unhealthy: {error}") from error
    return web.Response()


async def info(request: web.Request) -> web.Response:
    """``GET /info``: TGI's keys, and the names of the resident adapters."""
    serving = request.app[SERVING]
    limits, agreed = serving.settings.limits, serving.validator.agreed
    return web.json_response(
        {
            "model_id": serving.settings.model_id,
            "model_sha": serving.info.model_sha or None,
            "model_pipeline_tag": None,
            "max_concurrent_requests": limits.max_concurrent_requests,
            "max_best_of": limits.max_best_of,
            "max_stop_sequences": limits.max_stop_sequences,
            "max_input_tokens": agreed.max_input_tokens,
            "max_total_tokens": agreed.max_total_tokens,
            "validation_workers": 1,
            "max_client_batch_size": limits.max_client_batch_size,
            "router": "chunkwise",
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "adapters": sorted(serving.validator.adapters),
        }
    )


async def models(request: web.Request) -> web.Response:
    """``GET /v1/models``: the base model, then the adapters."""
    serving = request.app[SERVING]
    owner = serving.settings.model_id
    names = [owner, *sorted(serving.validator.adapters)]
    data = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name in names]
    return web.json_response({"object": "list", "data": data})


async def metrics(request: web.Request) -> web.Response:
    """``GET /metrics``. The shards are asked at every scrape; those that do not answer keep their last values."""
    serving = request.app[SERVING]
    try:
        serving.metrics.shard_states(await serving.shards.health())
    except GenerationFailed as error:
        _log.warning("metrics without fresh shard states: %s", error)
    return web.Response(body=serving.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

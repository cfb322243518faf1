"""What the handlers work with: one value, made at start, that reaches them through the aiohttp application."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from chunkwise.config.settings import RouterSettings
from chunkwise.core import ShardInfo
from chunkwise.router.api.validation import Validator
from chunkwise.router.loop import Loop
from chunkwise.router.metrics import Metrics
from chunkwise.router.permits import Permits
from chunkwise.router.shard_group import Shards


@dataclass(frozen=True, slots=True)
class Serving:
    """The running parts of one router."""

    settings: RouterSettings
    info: ShardInfo
    shards: Shards
    loop: Loop
    validator: Validator
    metrics: Metrics
    permits: Permits

    @property
    def compute_type(self) -> str:
        """Value of the header x-compute-type, in TGI's form."""
        return f"{'gpu' if self.info.device_type == 'cuda' else self.info.device_type}+optimized"


SERVING = web.AppKey("serving", Serving)

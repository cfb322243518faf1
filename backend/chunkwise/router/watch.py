"""Notices that a shard is gone, which an idle router would not. It cannot bring one back."""

from __future__ import annotations

import asyncio
import logging

from chunkwise.core import GenerationFailed
from chunkwise.router.shard_group import ShardLost, Shards

_log = logging.getLogger(__name__)


async def watch(shards: Shards, period_s: float) -> None:
    """Asks for the shards' health every ``period_s`` seconds, for ever.

    Raises:
        ShardLost: a shard is gone.
    """
    while True:
        await asyncio.sleep(period_s)
        try:
            await shards.health()
        except ShardLost:
            raise
        except GenerationFailed as error:
            _log.warning("a shard does not answer: %s", error)

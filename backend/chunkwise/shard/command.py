"""``chunkwise shard``."""

from __future__ import annotations

import argparse
import asyncio

from chunkwise.config.resolve import shard_settings
from chunkwise.logs import configure_logging
from chunkwise.shard.process import serve


def run(args: argparse.Namespace) -> None:
    """Serves one rank until SIGTERM or SIGINT."""
    settings = shard_settings(args)
    configure_logging(settings.log, f"shard {settings.parallel.rank}")
    asyncio.run(serve(settings))

"""``chunkwise front``."""

from __future__ import annotations

import argparse
import asyncio

from chunkwise.config.resolve import front_settings
from chunkwise.logs import configure_logging
from chunkwise.router.front import serve


def run(args: argparse.Namespace) -> None:
    """Serves generate.v3 until SIGTERM or SIGINT."""
    settings = front_settings(args)
    configure_logging(settings.log, "front")
    asyncio.run(serve(settings))

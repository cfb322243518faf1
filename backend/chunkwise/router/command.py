"""``chunkwise router``."""

from __future__ import annotations

import argparse
import asyncio

from chunkwise.config.resolve import router_settings
from chunkwise.logs import configure_logging
from chunkwise.router.server import serve


def run(args: argparse.Namespace) -> None:
    """Serves HTTP until SIGTERM or SIGINT."""
    settings = router_settings(args)
    configure_logging(settings.log, "router")
    asyncio.run(serve(settings))

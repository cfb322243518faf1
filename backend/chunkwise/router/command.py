"""``chunkwise router``."""

from __future__ import annotations

import argparse
import asyncio

from chunkwise.config.flags import router_settings
from chunkwise.launcher.supervisor import die_with_parent
from chunkwise.logs import configure_logging
from chunkwise.router.server import serve


def run(args: argparse.Namespace) -> None:
    """Serves HTTP until SIGTERM or SIGINT."""
    settings = router_settings(args)
    configure_logging(settings.log, "router")
    die_with_parent()
    asyncio.run(serve(settings))

"""``chunkwise serve``."""

from __future__ import annotations

import argparse

from chunkwise.config.resolve import serve_settings
from chunkwise.launcher.serve import serve
from chunkwise.logs import configure_logging


def run(args: argparse.Namespace) -> None:
    """Starts and supervises router and shards until SIGTERM or SIGINT."""
    settings = serve_settings(args)
    configure_logging(settings.log, "chunkwise")
    serve(settings)

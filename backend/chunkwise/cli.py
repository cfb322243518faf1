"""Entry point of every process: ``chunkwise serve | router | front | shard``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from chunkwise.config.flags import build_parser
from chunkwise.core import ChunkwiseError
from chunkwise.lifetime import PARENT_VARIABLE, die_with_parent

# Named, not imported: a router must not load torch, and --help should load nothing.
_COMMANDS = {
    "serve": "chunkwise.launcher.command",
    "router": "chunkwise.router.command",
    "front": "chunkwise.router.front_command",
    "shard": "chunkwise.shard.command",
    "bench": "chunkwise.bench.command",
    "eval": "chunkwise.evaluation.command",
    "ladder": "chunkwise.evaluation.ladder_command",
    "calibrate": "chunkwise.evaluation.calibrate_command",
    "experiments": "chunkwise.evaluation.experiments.command",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. What is refused on purpose ends with one line on standard error and status 1."""
    try:
        # Before anything heavy is imported: a parent that dies meanwhile must not leave this process behind.
        if PARENT_VARIABLE in os.environ:
            die_with_parent(int(os.environ[PARENT_VARIABLE]))
        args = build_parser(os.environ).parse_args(argv)
        importlib.import_module(_COMMANDS[args.command]).run(args)
    except ChunkwiseError as error:
        sys.exit(f"chunkwise: {error}")

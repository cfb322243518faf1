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

# gRPC's event engine hands every message through two or three threads, on cores that the model needs. Without it, the
# thread that waits for completions reads and writes the sockets itself. A gRPC that has no such choice left logs one
# line for each, and goes on.
_GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. What is refused on purpose ends with one line on standard error and status 1."""
    try:
        # Before anything heavy is imported: a parent that dies meanwhile must not leave this process behind.
        if PARENT_VARIABLE in os.environ:
            die_with_parent(int(os.environ[PARENT_VARIABLE]))
        args = build_parser(os.environ).parse_args(argv)
        # gRPC reads it at its start, which is the import of the command; a choice of the user's stands.
        os.environ.setdefault("GRPC_EXPERIMENTS", _GRPC_EXPERIMENTS)
        importlib.import_module(_COMMANDS[args.command]).run(args)
    except ChunkwiseError as error:
        sys.exit(f"chunkwise: {error}")

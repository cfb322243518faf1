"""Runs an engine's runner: ``python -P start.py RUNNER``, in any Python 3.11 that has the engine.

ChunkWise need not be installed there: its package is made importable by this file's place, and nothing beside it, so
that no package of the bench's own environment can stand in for one of the rival's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def make_importable(root: Path) -> None:
    """Registers the package directory ``root`` as ``chunkwise``."""
    spec = importlib.util.spec_from_file_location(
        "chunkwise", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chunkwise"] = module
    spec.loader.exec_module(module)


def main(name: str) -> None:
    """Answers requests with the class ``Engine`` of the runner module ``name`` until standard input ends."""
    make_importable(Path(__file__).resolve().parents[2])
    protocol = importlib.import_module("chunkwise.bench.runners.protocol")
    # Before the engine is imported: some print on import.
    replies = protocol.take_stdout()
    engine = importlib.import_module(f"chunkwise.bench.runners.{name}").Engine()
    protocol.answer(engine, sys.stdin, replies)


if __name__ == "__main__":
    main(sys.argv[1])

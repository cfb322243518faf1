"""Finds models and adapters: a local directory as it is, anything else as an id on the Hugging Face Hub."""

from __future__ import annotations

import importlib
from pathlib import Path


def locate(name: str, revision: str | None) -> Path:
    """The directory that holds ``name``, downloaded if need be.

    Raises:
        UnsupportedModel: neither a directory nor an id that the Hub, or its local cache when offline, knows.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local.resolve()
    # Named, not imported: a process that is given directories does without.
    directory: Path = importlib.import_module("chunkwise.download").download(name, revision)
    return directory


def hub_commit(directory: Path) -> str:
    """The Hub commit that a downloaded snapshot is of; empty for any other directory."""
    return directory.name if directory.parent.name == "snapshots" else ""

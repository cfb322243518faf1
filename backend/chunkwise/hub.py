"""Finds models and adapters: a local directory as it is, anything else as an id on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from chunkwise.core import UnsupportedModel

# Weights as safetensors only: pickles are never fetched.
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]


def locate(name: str, revision: str | None) -> Path:
    """The directory that holds ``name``, downloaded if need be.

    Raises:
        UnsupportedModel: neither a directory nor an id that the Hub, or its local cache when offline, knows.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local.resolve()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnsupportedModel(
            f"{name!r} is neither a directory nor available from the Hub ({type(error).__name__}); "
            "give an existing directory, or connect to the Hub"
        ) from error


def hub_commit(directory: Path) -> str:
    """The Hub commit that a downloaded snapshot is of; empty for any other directory."""
    return directory.name if directory.parent.name == "snapshots" else ""

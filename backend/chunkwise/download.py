"""Fetches models and adapters from the Hugging Face Hub; apart from `hub`, for huggingface_hub takes 10 to 14 MB."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from chunkwise.core import UnsupportedModel

# Weights as safetensors only: pickles are never fetched.
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]


def download(name: str, revision: str | None) -> Path:
    """The directory that the Hub's ``name`` is in, fetched if need be.

    Raises:
        UnsupportedModel: no id that the Hub, or its local cache when offline, knows.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnsupportedModel(
            f"{name!r} is neither a directory nor available from the Hub ({type(error).__name__}); "
            "give an existing directory, or connect to the Hub"
        ) from error

"""Entry point of the console script ``text-generation-server``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

from chunkwise.config.tgi_flags import tgi_settings
from chunkwise.core import ChunkwiseError
from chunkwise.logs import configure_logging


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one sub-command. What is refused on purpose ends with one line on standard error and status 1."""
    # TGI's launcher always switches this downloader on; huggingface_hub refuses to download if it is not installed.
    if importlib.util.find_spec("hf_transfer") is None:
        os.environ.pop("HF_HUB_ENABLE_HF_TRANSFER", None)
    try:
        settings = tgi_settings(argv, os.environ)
        configure_logging(settings.log, "text-generation-server")
        # Named, not imported: huggingface_hub reads the environment when it is imported.
        importlib.import_module("chunkwise.launcher.tgi").run(settings, os.environ)
    except ChunkwiseError as error:
        sys.exit(f"text-generation-server: {error}")

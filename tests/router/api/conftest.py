from __future__ import annotations

from pathlib import Path

import pytest

from routing import write_tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte tokenizer: a prompt of n ASCII characters has n + 1 tokens."""
    return write_tokenizer(tmp_path_factory.mktemp("model"))

"""Compiled kernels are found again only if nothing that was built into them has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from chunkwise.model.kernels import compile


def test_the_cache_folder_changes_with_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = shutil.copytree(compile._FOLDER, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compile, "_FOLDER", sources)
    folders = {compile._cache_folder(None)}
    assert compile._cache_folder(None) in folders
    for count, source in enumerate(sorted(sources.glob("*.py")), start=2):
        source.write_text(source.read_text() + "\n")
        folders.add(compile._cache_folder(None))
        assert len(folders) == count, source


def test_the_cache_is_below_the_configured_folder_or_the_user_s() -> None:
    assert compile._cache_folder("/somewhere").parent == Path("/somewhere")
    assert compile._cache_folder(None).parent == Path.home() / ".cache" / "chunkwise" / "kernels"

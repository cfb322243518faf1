"""An adapter's directory and the files in it that may be read: contained regular files, JSON and safetensors only.

It knows file names and where links may lead, not what the files mean. Pickle files are never read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chunkwise_adapters.errors import AdapterNotFound, BrokenAdapter, UnsupportedAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth"})


def open_directory(path: Path, name: str) -> Path:
    """The resolved directory of the adapter ``name``. Raises AdapterNotFound."""
    if not path.is_dir():
        raise AdapterNotFound(f"adapter {name!r}: {path} is not a directory; give the directory of a PEFT adapter")
    return path.resolve()


def read_config(root: Path, name: str) -> Any:
    """The decoded adapter_config.json of the resolved directory ``root``.

    Raises:
        AdapterNotFound: there is none.
        BrokenAdapter: it cannot be read, lies outside the directory or is not JSON.
    """
    file = contained_file(root, CONFIG_FILE, name)
    if file is None:
        raise AdapterNotFound(f"adapter {name!r}: {root} has no {CONFIG_FILE}; give the directory of a PEFT adapter")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokenAdapter(f"adapter {name!r}: {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenAdapter(f"adapter {name!r}: {file} is not valid JSON: {error}") from error


def read_tensors(root: Path, name: str) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors in the resolved directory ``root``, as stored.

    Raises:
        UnsupportedAdapter: the weights are there as a pickle file only.
        BrokenAdapter: there are none, or the file cannot be read, lies outside the directory or is malformed.
    """
    file = contained_file(root, WEIGHTS_FILE, name)
    if file is None:
        pickles = sorted(entry.name for entry in root.iterdir() if entry.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise UnsupportedAdapter(
                f"adapter {name!r}: {root} holds {pickles[0]} but no {WEIGHTS_FILE}; pickle files are never read, "
                "convert it to safetensors (load it with PEFT and save_pretrained again)"
            )
        raise BrokenAdapter(f"adapter {name!r}: {root} has no {WEIGHTS_FILE}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BrokenAdapter(f"adapter {name!r}: {file} is not a readable safetensors file: {error}") from error


FileStamp = tuple[int, int, int, int, int] | None


def file_stamp(root: Path, filename: str, name: str) -> FileStamp:
    """What changes when the file ``filename`` of the adapter's directory ``root`` is written, replaced or linked
    elsewhere: device, inode, size, times of the last write and the last change. None when there is no such file.

    Raises:
        BrokenAdapter: it is no regular file or lies outside the directory.
        OSError: it cannot be looked at.
    """
    file = contained_file(root.resolve(), filename, name)
    if file is None:
        return None
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def contained_file(root: Path, filename: str, name: str) -> Path | None:
    """The resolved regular file ``filename`` of the resolved directory ``root``; None when there is none.

    A link may not lead out of the directory, or a prepared adapter could make the server read any file. The Hub's cache
    is the exception: its snapshots are links into the ``blobs`` of the same ``models--*`` folder.
    """
    try:
        resolved = (root / filename).resolve(strict=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:  # Python before 3.13 reports a loop of links as RuntimeError
        raise BrokenAdapter(f"adapter {name!r}: {root / filename} cannot be read: {error}") from error
    caches = [parent for parent in root.parents if parent.name == "snapshots" and parent.parent.name[:8] == "models--"]
    if not resolved.is_relative_to(root) and resolved.parent not in [cache.parent / "blobs" for cache in caches]:
        raise BrokenAdapter(
            f"adapter {name!r}: {root / filename} points outside the adapter's directory, to {resolved}; "
            "copy the file into the directory"
        )
    if not resolved.is_file():
        raise BrokenAdapter(f"adapter {name!r}: {root / filename} is not a regular file")
    return resolved

"""Reads slices of a Hugging Face checkpoint (one or many safetensors files); never reads pickles."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chunkwise.core import UnsupportedModel
from chunkwise.heap import trim_heap


def _locate(model_dir: Path) -> dict[str, Path]:
    """File of each tensor."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        try:
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise UnsupportedModel(f"{index} is not a safetensors index: {error}") from error
        return {name: model_dir / file for name, file in names.items()}
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UnsupportedModel(f"{model_dir} holds no .safetensors file; convert the checkpoint to safetensors")
    located: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                located.update(dict.fromkeys(handle.keys(), file))
        except SafetensorError as error:
            raise UnsupportedModel(f"{file} is not a valid safetensors file: {error}") from error
    return located


class Checkpoint:
    """Tensors of a checkpoint by name, read slice by slice so that a rank never holds what another rank needs.

    Use as a context manager; files stay mapped until it closes.
    """

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._files = _locate(model_dir)
        self.dtype = dtype
        self.device = device
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def unmap(self) -> None:
        """Closes the files; the next read opens them again. What was read through a mapping counts as resident memory
        as long as it is open, so a caller that has copied enough calls this now and then. Memory that the copying has
        freed goes back to the system too; the C library would keep it."""
        self._stack.close()
        self._open.clear()
        trim_heap()

    def _handle(self, name: str) -> Any:
        if name not in self._files:
            raise UnsupportedModel(f"the checkpoint lacks tensor {name!r}")
        path = self._files[name]
        if path not in self._open:
            try:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UnsupportedModel(f"{path} cannot be read: {error}") from error
        return self._open[path]

    def read(
        self, name: str, shape: tuple[int, ...], rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """Rows and columns of a tensor, contiguous, in the model's dtype, on its device.

        Raises:
            UnsupportedModel: the tensor is missing, or its whole shape is not ``shape``.
        """
        view = self._handle(name).get_slice(name)
        if tuple(view.get_shape()) != shape:
            raise UnsupportedModel(f"tensor {name!r} has shape {tuple(view.get_shape())}; config.json says {shape}")
        rows = rows or slice(None)
        part = view[rows] if columns is None else view[rows, columns]
        # copy: a slice of a mapped file must not keep the file's pages alive, and rows need to be contiguous.
        tensor: Tensor = part.to(device=self.device, dtype=self.dtype, copy=True)
        return tensor.contiguous()

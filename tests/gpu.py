"""Where GPU code is tested: on the CUDA device if there is one, else on the CPU in Triton's interpreter."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Kernels, Triton's own helpers among them, are bound to the interpreter when they are imported: so this comes early.
if DEVICE.type == "cpu" and find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    import_module("triton.language")


def kernels(module: str) -> Any:
    """The module of ours with Triton kernels that is named so, ready to run on `DEVICE`; skips where Triton is not
    installed."""
    pytest.importorskip("triton")
    return import_module(module)

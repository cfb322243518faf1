"""Who may import whom: the rules of the design, read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"chunkwise": ROOT / "backend" / "chunkwise", "chunkwise_adapters": ROOT / "adapters" / "chunkwise_adapters"}
SHARED = {"core", "config"}
# Room of chunkwise -> rooms of chunkwise it may import (beside itself and SHARED).
MAY_IMPORT = {
    "core": set(),
    "config": set(),
    "heap": set(),
    "tokenizer": {"heap"},
    "logs": set(),
    "hub": set(),
    "download": set(),
    "pb": set(),
    "wire": {"pb"},
    "steering": set(),
    "kv": set(),
    "model": {"kv", "heap"},
    "lifetime": set(),
    "shard": {"wire", "kv", "model", "pb", "tokenizer", "hub", "heap", "logs", "lifetime"},
    "router": {"wire", "steering", "pb", "tokenizer", "logs", "lifetime"},
    "launcher": {"hub", "logs", "lifetime"},
    "bench": {"tokenizer", "model"},
    # Measures the whole of it; nobody imports it, the CLI starts it by name.
    "evaluation": {"wire", "steering", "kv", "model", "shard", "router", "tokenizer", "hub", "logs"},
    "cli": {"lifetime"},
    "__main__": {"cli"},
    "__init__": set(),
}
MAY_IMPORT_PB = {"wire.py", "shard/server.py", "router/front.py", "router/shards.py", "router/decode_stream.py"}
MAY_IMPORT_GRPC = {"shard/server.py", "router/front.py", "router/shards.py", "router/decode_stream.py"}
STDLIB_ONLY = {"core", "config"}
NO_TORCH = {
    "core",
    "config",
    "wire",
    "steering",
    "router",
    "heap",
    "tokenizer",
    "launcher",
    "logs",
    "hub",
    "download",
    "cli",
    "pb",
    "lifetime",
}
PURE = {"kv/pages.py", "shard/scheduler.py", "router/backlog.py"}
IMPURE_MODULES = {"asyncio", "grpc", "torch", "time", "os", "random", "socket", "threading", "datetime", "secrets"}


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOMS[package].rglob("*.py")):
        yield path.relative_to(ROOMS[package]).as_posix(), path


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(relative: str) -> str:
    return relative.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize(("relative", "path"), list(_modules("chunkwise")))
def test_rooms_import_only_what_they_may(relative: str, path: Path) -> None:
    room = _room(relative)
    for name in _imports(path):
        parts = name.split(".")
        top = parts[0]
        if top == "chunkwise" and len(parts) > 1:
            assert parts[1] in MAY_IMPORT[room] | SHARED | {room, "__version__"}, f"{relative} imports {name}"
            if parts[1] == "pb" and room != "pb":
                assert relative in MAY_IMPORT_PB, f"{relative} imports {name}"
        elif top == "chunkwise_adapters":
            assert room in {"shard", "model", "bench", "evaluation"}, f"{relative} imports {name}"
        if top == "grpc" and room != "pb":
            assert relative in MAY_IMPORT_GRPC, f"{relative} imports {name}"
        if top in {"torch", "transformers"}:
            assert room not in NO_TORCH, f"{relative} imports {name}"
        if room in STDLIB_ONLY and top != "chunkwise":
            assert top in sys.stdlib_module_names, f"{relative} imports {name}"
        if room == "steering" or relative in PURE:
            assert top not in IMPURE_MODULES, f"{relative} imports {name}"


@pytest.mark.parametrize(("relative", "path"), list(_modules("chunkwise_adapters")))
def test_adapters_know_nothing_of_the_server(relative: str, path: Path) -> None:
    allowed = {"chunkwise_adapters", "torch", "numpy", "safetensors", "triton", "__future__", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in _imports(path)} <= allowed, relative


@pytest.mark.parametrize("package", list(ROOMS))
def test_no_imports_inside_functions(package: str) -> None:
    for relative, path in _modules(package):
        if _room(relative) == "pb":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [n.lineno for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not inner, f"{relative}:{inner} imports inside a function"


def test_only_flags_read_the_environment() -> None:
    """The launcher passes its environment on, and the cli hands it to the parser; nobody else looks at it."""
    for relative, path in _modules("chunkwise"):
        if relative not in {"cli.py", "launcher/serve.py", "launcher/tgi_cli.py"}:
            text = path.read_text(encoding="utf-8")
            assert "os.environ" not in text, relative
            assert "getenv" not in text, relative


@pytest.mark.parametrize(
    "module",
    [
        "chunkwise.router.command",
        "chunkwise.router.front_command",
        "chunkwise.launcher.command",
        "chunkwise.launcher.tgi",
        "chunkwise.launcher.tgi_cli",
        "chunkwise.cli",
    ],
)
def test_processes_without_a_model_never_load_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted(m for m in ('torch', 'transformers') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["chunkwise.launcher.command", "chunkwise.router.command", "chunkwise.shard.command"]
)
def test_what_only_some_servers_need_is_loaded_by_those_alone(module: str) -> None:
    """These take 10 MB or more of every process that imports them."""
    seldom = ("huggingface_hub", "sympy", "torch._dynamo", "torch._inductor")
    code = f"import sys, {module}; print([m for m in {seldom} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

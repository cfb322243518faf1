"""What ``text-generation-server`` does: brings up one tensor-parallel rank, or fetches weights.

Rank 0 starts its shard on an internal socket and in front of it the steering router, which takes the socket that TGI's
launcher waits for. Every other rank, and with plain shards rank 0 too, is a shard on the launcher's socket itself.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from chunkwise.config.settings import LogSettings
from chunkwise.config.tgi_flags import TgiDownloadSettings, TgiServeSettings
from chunkwise.core import UnsupportedModel
from chunkwise.hub import locate
from chunkwise.launcher.supervisor import Supervisor

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
# TGI's launcher kills after 90 s; front and shard are ended one after the other.
_GRACE_SECONDS = 20.0
_PYTHON = (sys.executable, "-m", "chunkwise")


def run(settings: TgiServeSettings | TgiDownloadSettings, env: Mapping[str, str]) -> None:
    """Runs a sub-command; the processes it starts inherit ``env``. Raises as `serve` and `download_weights`."""
    if isinstance(settings, TgiServeSettings):
        serve(settings, env)
    else:
        download_weights(settings)


def download_weights(settings: TgiDownloadSettings) -> None:
    """Makes sure that a model's or an adapter's weights are on this machine.

    Raises:
        UnsupportedModel: they cannot be found, are not safetensors, or belong to an adapter in place of a base model.
    """
    directory = locate(settings.model_id, settings.revision)
    if settings.extension != ".safetensors" or not any(directory.glob("*.safetensors")):
        raise UnsupportedModel(
            f"{settings.model_id} in {directory} has no weights that can be served with extension "
            f"{settings.extension!r}; only .safetensors files are read"
        )
    if settings.base_model and not (directory / "config.json").is_file():
        raise UnsupportedModel(
            f"{settings.model_id} in {directory} has no config.json, so it is no base model; "
            "serve the model that an adapter was trained on, and name the adapter in LORA_ADAPTERS"
        )
    _log.info("the weights of %s are in %s", settings.model_id, directory)


def serve(settings: TgiServeSettings, env: Mapping[str, str]) -> None:
    """Runs one rank until SIGTERM or SIGINT, and leaves no socket behind.

    Raises:
        UnsupportedModel: model or adapter cannot be found.
        ProcessFailed: a process of this rank ended by itself; the other has been ended too.
    """
    for note in settings.notes:
        _log.warning(note)
    model_dir = locate(settings.model_id, settings.revision)
    rank = settings.parallel.rank
    own, public = shard_sockets(settings)[rank], Path(f"{settings.uds_path}-{rank}")
    shard, front = shard_command(settings, model_dir), front_command(settings, model_dir)
    supervisor = Supervisor(grace_seconds=_GRACE_SECONDS)
    try:
        for path in (own, public):
            path.unlink(missing_ok=True)
        supervisor.start(f"shard {rank}", shard, env)
        if own != public:
            while not own.exists() and not supervisor.stopping:
                supervisor.check()
                time.sleep(_POLL_SECONDS)
            if not supervisor.stopping:
                supervisor.start("front", front, env)
        supervisor.wait()
    finally:
        supervisor.stop()
        for path in (own, public):
            path.unlink(missing_ok=True)


def shard_sockets(settings: TgiServeSettings) -> list[Path]:
    """Where the shards listen, by rank. The steering router keeps the name that TGI's router connects to."""
    paths = [Path(f"{settings.uds_path}-{rank}") for rank in range(settings.parallel.world_size)]
    return paths if settings.plain else [Path(f"{paths[0]}.shard"), *paths[1:]]


def shard_command(settings: TgiServeSettings, model_dir: Path) -> list[str]:
    """The command of this rank's shard. Raises UnsupportedModel if an adapter cannot be found."""
    place = settings.parallel
    # As JSON: a path may hold the separators of the flag's own grammar.
    adapters = json.dumps({a.name: str(locate(a.source, a.revision)) for a in settings.adapters})
    command = [
        *_PYTHON,
        "shard",
        f"--model-id={model_dir}",
        f"--lora-adapters={adapters}",
        f"--rank={place.rank}",
        f"--world-size={place.world_size}",
        f"--master-addr={place.master_addr}",
        f"--master-port={place.master_port}",
        *_shared(settings),
    ]
    if settings.dtype is not None:
        command.append(f"--dtype={settings.dtype}")
    if settings.quantize is not None:
        command.append(f"--quantize={settings.quantize}")
    if settings.threads is not None:
        command.append(f"--threads={settings.threads}")
    if settings.prefill_logprobs:
        command.append("--enable-prefill-logprobs")
    return command


def front_command(settings: TgiServeSettings, model_dir: Path) -> list[str]:
    """The command of the steering router in front of all shards."""
    return [
        *_PYTHON,
        "front",
        f"--model-id={model_dir}",
        f"--model-name={settings.model_id}",
        f"--listen=unix://{settings.uds_path}-0",
        f"--policy={settings.policy or ''}",
        *_shared(settings),
    ]


def _shared(settings: TgiServeSettings) -> list[str]:
    urls = ",".join(f"unix://{path}" for path in shard_sockets(settings))
    return [f"--shard-urls={urls}", *_log_flags(settings.log)]


def _log_flags(log: LogSettings) -> list[str]:
    return [f"--log-level={log.level}", *(["--json-output"] if log.json_output else [])]

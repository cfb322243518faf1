"""``chunkwise serve``: shards first, then the router, then a ready line. Commands of the children are built here."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from chunkwise.config.settings import AdapterSource, ServeSettings
from chunkwise.hub import locate
from chunkwise.launcher.supervisor import Supervisor

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
# The router is on this machine: a proxy from the environment must not come between.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Flags that each kind of child takes as the launcher got them.
_SHARED = ("json_output", "log_level")
_SHARD_FLAGS = (
    *_SHARED,
    "dtype",
    "quantize",
    "max_active_adapters",
    "record_cuda_graphs",
    "max_batch_total_tokens",
    "enable_prefill_logprobs",
    "disable_prefix_caching",
    "watermark_gamma",
    "watermark_delta",
)
_ROUTER_FLAGS = (
    *_SHARED,
    "hostname",
    "policy",
    "no_steering",
    "max_input_tokens",
    "max_total_tokens",
    "max_batch_prefill_tokens",
    "max_batch_size",
    "kv_growth_reserve",
    "max_concurrent_requests",
    "max_best_of",
    "max_stop_sequences",
    "max_top_n_tokens",
    "max_client_batch_size",
    "payload_limit",
    "disable_grammar_support",
)


def _passed_on(flags: Mapping[str, object], names: Sequence[str]) -> list[str]:
    arguments: list[str] = []
    for name in names:
        value, flag = flags[name], "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False:
            arguments.append(f"{flag}={value}")
    return arguments


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _resolve_adapters(sources: Sequence[AdapterSource]) -> str:
    return json.dumps({source.name: str(locate(source.source, source.revision)) for source in sources})


def _curl(url: str, adapters: Sequence[AdapterSource], *, key: bool) -> str:
    prompt = "Context: The tower is 330 metres tall and stands in Paris.\nQuestion: How tall is the tower?\nAnswer:"
    parameters: dict[str, object] = {"max_new_tokens": 32}
    if adapters:
        parameters["adapter_id"] = adapters[0].name
    body = json.dumps({"inputs": prompt, "parameters": parameters})
    authorization = " -H 'authorization: Bearer YOUR_KEY'" if key else ""
    return f"curl {url}/generate_stream -H 'content-type: application/json'{authorization} -d '{body}'"


def _reachable(hostname: str) -> str:
    """The address under which this machine reaches a server that listens on ``hostname``."""
    try:
        socket.getaddrinfo(hostname, None)
    except socket.gaierror:
        return "127.0.0.1"
    return "127.0.0.1" if hostname in ("0.0.0.0", "::") else hostname


def _await(supervisor: Supervisor, ready: Path | str) -> None:
    """Waits for a socket file, or for a health url to answer 200."""
    while not supervisor.stopping:
        supervisor.check()
        if isinstance(ready, Path):
            if ready.exists():
                return
        else:
            try:
                with _DIRECT.open(ready, timeout=5) as response:
                    if response.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
        time.sleep(_POLL_SECONDS)


def serve(settings: ServeSettings) -> None:
    """Runs until SIGTERM or SIGINT.

    Raises:
        UnsupportedModel: model or adapter cannot be found.
        ProcessFailed: a child ended by itself; all others have been ended too.
    """
    model_dir = locate(settings.model_id, settings.revision)
    adapters = _resolve_adapters(settings.adapters)
    port = settings.port or _free_port()
    threads = settings.threads or max((os.cpu_count() or 1) // settings.num_shard, 1)
    master_port = _free_port()
    supervisor = Supervisor()
    # What the flags say must win over what the children would read from the environment themselves.
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if settings.api_key:
        # Not as a flag: command lines are visible to every user of the machine.
        env["API_KEY"] = settings.api_key
    with tempfile.TemporaryDirectory(prefix="chunkwise-") as folder:
        sockets = [Path(folder) / f"shard-{rank}" for rank in range(settings.num_shard)]
        urls = ",".join(f"unix://{path}" for path in sockets)
        python = [sys.executable, "-m", "chunkwise"]
        try:
            for rank in range(settings.num_shard):
                place = [
                    f"--rank={rank}",
                    f"--world-size={settings.num_shard}",
                    "--master-addr=127.0.0.1",
                    f"--master-port={master_port}",
                ]
                own = [f"--model-id={model_dir}", f"--shard-urls={urls}", f"--threads={threads}"]
                own.append(f"--lora-adapters={adapters}")
                command = [*python, "shard", *own, *place, *_passed_on(settings.flags, _SHARD_FLAGS)]
                supervisor.start(f"shard {rank}", command, env)
            for path in sockets:
                _await(supervisor, path)
            own = [f"--model-id={model_dir}", f"--model-name={settings.model_id}", f"--shard-urls={urls}"]
            command = [*python, "router", *own, f"--port={port}", *_passed_on(settings.flags, _ROUTER_FLAGS)]
            supervisor.start("router", command, env)
            host = _reachable(settings.hostname)
            _await(supervisor, f"http://{host}:{port}/health")
            if not supervisor.stopping:
                curl = _curl(f"http://{host}:{port}", settings.adapters, key=settings.api_key is not None)
                logger.info("ready on http://%s:%d\n%s", host, port, curl)
            supervisor.wait()
        finally:
            supervisor.stop()

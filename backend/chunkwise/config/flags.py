"""Command-line flags and environment variables; nothing else reads either. Names are those of TGI's launcher: a flag
``--max-total-tokens`` may also be given as ``MAX_TOTAL_TOKENS``; the flag wins."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from chunkwise.config.bench_flags import add_bench
from chunkwise.config.calibrate_flags import add_calibrate_parser
from chunkwise.config.eval_flags import add_eval_parser
from chunkwise.config.experiment_flags import add_experiments_parser
from chunkwise.config.ladder_flags import add_ladder_parser
from chunkwise.core import ChunkwiseError

_DTYPES = ("float32", "bfloat16", "float16")


class InvalidFlags(ChunkwiseError):
    """A flag or environment variable whose value cannot be used."""


class _Flags:
    """Adds flags that fall back to the environment."""

    def __init__(self, parser: argparse.ArgumentParser, env: Mapping[str, str]) -> None:
        self._parser = parser
        self._env = env

    def value(self, flag: str, help: str, *, kind: type[Any] = str, default: Any = None, choices: Any = None) -> None:
        name = flag.removeprefix("--").replace("-", "_").upper()
        raw, shown = self._env.get(name), "" if default is None else f" (default: {default})"
        if raw:
            try:
                default = kind(raw)
            except ValueError as error:
                raise InvalidFlags(
                    f"environment variable {name} is {raw!r}; a value of type {kind.__name__}"
                ) from error
            if choices is not None and default not in choices:
                raise InvalidFlags(f"environment variable {name} is {raw!r}; use one of {', '.join(choices)}")
        self._parser.add_argument(
            flag, type=kind, default=default, choices=choices, help=f"{help}{shown} [env: {name}]"
        )

    def switch(self, flag: str, help: str) -> None:
        name = flag.removeprefix("--").replace("-", "_").upper()
        raw = self._env.get(name, "").lower()
        if raw not in ("", "0", "1", "false", "true"):
            raise InvalidFlags(f"environment variable {name} is {raw!r}; use true or false")
        on = raw in ("1", "true")
        self._parser.add_argument(flag, action="store_true", default=on, help=f"{help} [env: {name}]")


def _model_flags(flags: _Flags) -> None:
    flags.value("--model-id", "directory of a Hugging Face LLaMA checkpoint, or its id on the Hub")
    flags.value("--revision", "Hub revision of the model: a branch, a tag or a commit")
    flags.value(
        "--dtype", "data type of weights and KV cache; default float32 on CPU, the checkpoint's on GPU", choices=_DTYPES
    )
    flags.value("--quantize", "int8 or int4: base matrices in 8 or 4 bits; on CPU, which then computes in float32")
    flags.value(
        "--lora-adapters", "adapters to serve: name=path, name=path@revision, hub/id or hub/id@revision, by comma"
    )
    flags.value(
        "--max-active-adapters", "adapters kept in memory, others are read when asked for; default: all", kind=int
    )
    flags.value("--max-batch-total-tokens", "tokens the KV cache holds; default from the free memory", kind=int)
    flags.switch("--enable-prefill-logprobs", "answer requests for prompt logprobs; without it they are ignored")
    flags.switch("--disable-prefix-caching", "compute every prompt anew instead of reusing what earlier ones share")
    flags.value("--watermark-gamma", "share of the vocabulary that a watermark favours", kind=float, default=0.5)
    flags.value("--watermark-delta", "what a watermark adds to the scores of that share", kind=float, default=2.0)
    flags.value(
        "--threads", "CPU threads of each shard, no more than are free; default: the cores over the shards", kind=int
    )
    flags.switch("--record-cuda-graphs", "run decode steps on one GPU as CUDA graphs; not yet tried on a GPU")
    _log_flags(flags)


def _log_flags(flags: _Flags) -> None:
    flags.switch("--json-output", "write logs as JSON lines, one object per line, as TGI does")
    flags.value("--log-level", "least severe level that is logged", default="INFO")


def _steering_flags(flags: _Flags) -> None:
    flags.value("--policy", "TOML file with the estimator, chunker, rank and kv settings of steering")
    flags.switch("--no-steering", "serve plain LoRA at full rank with an uncompressed KV cache")


def _router_flags(flags: _Flags) -> None:
    flags.value("--hostname", "address to listen on", default="0.0.0.0")
    flags.value("--port", "port to listen on; 0 takes a free one", kind=int, default=3000)
    flags.value("--api-key", "key that clients must send as 'Authorization: Bearer KEY'; default: no key is asked")
    _steering_flags(flags)
    flags.value("--max-input-tokens", "longest prompt in tokens; default: max-total-tokens less 1", kind=int)
    flags.value(
        "--max-total-tokens", "longest prompt plus answer in tokens; default: what model and memory allow", kind=int
    )
    flags.value(
        "--max-batch-prefill-tokens",
        "most tokens computed in one step, for which running answers wait; default: 4096, on CPUs 512",
        kind=int,
    )
    flags.value("--max-batch-size", "most requests in one batch; default: no limit but memory", kind=int)
    flags.value(
        "--kv-growth-reserve",
        "tokens of growth that each running request has KV memory kept free for; when it is short, requests are "
        "compressed, and at worst the youngest is interrupted and computed anew later",
        kind=int,
        default=64,
    )
    flags.value(
        "--max-concurrent-requests", "requests accepted at once; more are refused with 429", kind=int, default=128
    )
    flags.value("--max-best-of", "largest best_of", kind=int, default=2)
    flags.value("--max-stop-sequences", "most stop sequences of a request", kind=int, default=4)
    flags.value("--max-client-batch-size", "most prompts in one client request", kind=int, default=4)
    flags.value("--max-top-n-tokens", "largest top_n_tokens", kind=int, default=5)
    flags.value("--payload-limit", "largest request body in bytes", kind=int, default=2_000_000)
    flags.switch("--disable-grammar-support", "refuse requests with a grammar")


def build_parser(env: Mapping[str, str]) -> argparse.ArgumentParser:
    """The parser of all commands, with defaults from ``env``.

    Raises:
        InvalidFlags: an environment variable that cannot be used.
    """
    parser = argparse.ArgumentParser("chunkwise", description="TGI-compatible LLaMA server with chunk-wise LoRA rank.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start router and shards on this machine and supervise them")
    flags = _Flags(serve, env)
    _model_flags(flags)
    flags.value("--num-shard", "tensor-parallel shards", kind=int, default=1)
    _router_flags(flags)

    router = commands.add_parser("router", help="the router process alone (chunkwise serve starts it)")
    flags = _Flags(router, env)
    flags.value("--model-id", "directory of the model, for its tokenizer")
    flags.value("--model-name", "what /info calls the model; default: the directory")
    flags.value("--shard-urls", "addresses of all shards by rank, by comma: unix://path or host:port")
    _log_flags(flags)
    _router_flags(flags)

    front = commands.add_parser("front", help="a router that serves generate.v3 to a TGI router, in place of HTTP")
    flags = _Flags(front, env)
    flags.value("--listen", "address to serve on: unix://path or host:port")
    flags.value("--model-id", "directory of the model, for its tokenizer")
    flags.value("--model-name", "adapter id that means the base model; default: the directory")
    flags.value("--shard-urls", "addresses of all shards by rank, by comma: unix://path or host:port")
    _log_flags(flags)
    _steering_flags(flags)

    shard = commands.add_parser(
        "shard", help="one model shard alone; its place is RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
    )
    flags = _Flags(shard, env)
    _model_flags(flags)
    flags.value("--shard-urls", "addresses of all shards by rank, by comma: unix://path or host:port")
    flags.value("--rank", "rank of this shard", kind=int, default=0)
    flags.value("--world-size", "number of shards", kind=int, default=1)
    flags.value("--master-addr", "host where rank 0 of the process group listens", default="127.0.0.1")
    flags.value("--master-port", "port where rank 0 of the process group listens", kind=int, default=29500)

    add_eval_parser(commands)
    add_ladder_parser(commands)
    add_calibrate_parser(commands)
    add_experiments_parser(commands)
    add_bench(commands)
    return parser

"""Command-line flags and environment variables; nothing else reads either. Names are those of TGI's launcher: a flag
``--max-total-tokens`` may also be given as ``MAX_TOTAL_TOKENS``; the flag wins."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from chunkwise.config.adapters import parse_lora_adapters
from chunkwise.config.policy import SteeringPolicy, load_policy
from chunkwise.config.settings import (
    FrontSettings,
    Limits,
    LogSettings,
    ParallelSettings,
    RouterSettings,
    ServeSettings,
    ShardSettings,
    WatermarkSettings,
)
from chunkwise.core import ChunkwiseError

_LOG_LEVELS = ("TRACE", "DEBUG", "INFO", "SUCCESS", "WARN", "WARNING", "ERROR", "CRITICAL", "OFF")
_MAY_BE_ZERO = ("max_stop_sequences", "max_top_n_tokens")
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
    flags.value("--quantize", "TGI's flag for weight formats; none is implemented yet, so any value is refused")
    flags.value(
        "--lora-adapters", "adapters to serve: name=path, name=path@revision, hub/id or hub/id@revision, by comma"
    )
    flags.value("--max-batch-total-tokens", "tokens the KV cache holds; default from the free memory", kind=int)
    flags.switch("--enable-prefill-logprobs", "answer requests for prompt logprobs; without it they are ignored")
    flags.switch("--disable-prefix-caching", "compute every prompt anew instead of reusing what earlier ones share")
    flags.value("--watermark-gamma", "share of the vocabulary that a watermark favours", kind=float, default=0.5)
    flags.value("--watermark-delta", "what a watermark adds to the scores of that share", kind=float, default=2.0)
    flags.value("--threads", "CPU threads of each shard; default: the machine's cores over the shards", kind=int)
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
    flags.value("--max-batch-prefill-tokens", "most tokens computed in one step", kind=int, default=4096)
    flags.value("--max-batch-size", "most requests in one batch; default: no limit but memory", kind=int)
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
    return parser


def _required(args: argparse.Namespace, name: str) -> str:
    value = getattr(args, name)
    flag = name.replace("_", "-")
    if not value:
        raise InvalidFlags(f"--{flag} is missing; give it as a flag or as {name.upper()} in the environment")
    return str(value)


def _policy(args: argparse.Namespace) -> SteeringPolicy | None:
    if args.no_steering:
        if args.policy:
            raise InvalidFlags("--policy and --no-steering exclude each other; drop one")
        return None
    return load_policy(Path(args.policy)) if args.policy else SteeringPolicy()


def _log(args: argparse.Namespace) -> LogSettings:
    # TGI's RUST_LOG-like form "info,h2=warn" is read up to the first comma.
    level = args.log_level.split(",")[0].strip().upper()
    if level not in _LOG_LEVELS:
        raise InvalidFlags(f"--log-level is {args.log_level!r}; use one of {', '.join(_LOG_LEVELS)}")
    return LogSettings(level=level, json_output=args.json_output)


def _check_model(args: argparse.Namespace) -> None:
    if args.quantize:
        raise InvalidFlags(f"--quantize is {args.quantize!r}; no weight format but the plain one is implemented yet")
    for name in ("max_batch_total_tokens", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidFlags(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def _watermark(args: argparse.Namespace) -> WatermarkSettings:
    settings = WatermarkSettings(args.watermark_gamma, args.watermark_delta)
    if not 0.0 < settings.gamma < 1.0:
        raise InvalidFlags(f"--watermark-gamma is {settings.gamma}; it must lie between 0 and 1")
    if not math.isfinite(settings.delta):
        raise InvalidFlags(f"--watermark-delta is {settings.delta}; it must be finite")
    return settings


def _limits(args: argparse.Namespace) -> Limits:
    limits = Limits(
        max_concurrent_requests=args.max_concurrent_requests,
        max_best_of=args.max_best_of,
        max_stop_sequences=args.max_stop_sequences,
        max_top_n_tokens=args.max_top_n_tokens,
        max_client_batch_size=args.max_client_batch_size,
        max_input_tokens=args.max_input_tokens,
        max_total_tokens=args.max_total_tokens,
        max_batch_prefill_tokens=args.max_batch_prefill_tokens,
        max_batch_size=args.max_batch_size,
        payload_limit=args.payload_limit,
        disable_grammar_support=args.disable_grammar_support,
    )
    for name in (field.name for field in fields(limits)):
        value = getattr(limits, name)
        if isinstance(value, int) and not isinstance(value, bool) and value < (0 if name in _MAY_BE_ZERO else 1):
            raise InvalidFlags(
                f"--{name.replace('_', '-')} is {value}; it must be at least {0 if name in _MAY_BE_ZERO else 1}"
            )
    inputs, total = limits.max_input_tokens, limits.max_total_tokens
    if inputs is not None and total is not None and inputs >= total:
        raise InvalidFlags(f"--max-input-tokens is {inputs}; it must be below --max-total-tokens, {total}")
    return limits


def router_settings(args: argparse.Namespace) -> RouterSettings:
    """Settings of the ``router`` command. Raises InvalidFlags or InvalidPolicy."""
    model = _required(args, "model_id")
    return RouterSettings(
        model_id=args.model_name or model,
        model_dir=Path(model),
        shard_urls=tuple(_required(args, "shard_urls").split(",")),
        hostname=args.hostname,
        port=args.port,
        api_key=args.api_key or None,
        limits=_limits(args),
        policy=_policy(args),
        log=_log(args),
    )


def front_settings(args: argparse.Namespace) -> FrontSettings:
    """Settings of the ``front`` command. Raises InvalidFlags or InvalidPolicy."""
    model = _required(args, "model_id")
    return FrontSettings(
        model_id=args.model_name or model,
        model_dir=Path(model),
        listen=_required(args, "listen"),
        shard_urls=tuple(_required(args, "shard_urls").split(",")),
        policy=_policy(args),
        log=_log(args),
    )


def shard_settings(args: argparse.Namespace) -> ShardSettings:
    """Settings of the ``shard`` command. Raises InvalidFlags."""
    _check_model(args)
    model, urls = _required(args, "model_id"), tuple(_required(args, "shard_urls").split(","))
    if not 0 <= args.rank < args.world_size or len(urls) != args.world_size:
        raise InvalidFlags(
            f"rank {args.rank} of world size {args.world_size} with {len(urls)} shard urls; "
            "rank must be below world size, and every rank needs a url"
        )
    return ShardSettings(
        model_id=model,
        urls=urls,
        revision=args.revision,
        parallel=ParallelSettings(args.rank, args.world_size, args.master_addr, args.master_port),
        dtype=args.dtype,
        adapters=parse_lora_adapters(args.lora_adapters or ""),
        max_batch_total_tokens=args.max_batch_total_tokens,
        prefix_caching=not args.disable_prefix_caching,
        prefill_logprobs=args.enable_prefill_logprobs,
        watermark=_watermark(args),
        threads=args.threads,
        log=_log(args),
    )


def serve_settings(args: argparse.Namespace) -> ServeSettings:
    """Settings of the ``serve`` command; every flag is checked here, before a process is started.

    Raises:
        InvalidFlags, InvalidPolicy: a flag that cannot be used.
    """
    _check_model(args)
    _watermark(args)
    _policy(args)
    _limits(args)
    if args.num_shard < 1:
        raise InvalidFlags(f"--num-shard is {args.num_shard}; it must be at least 1")
    return ServeSettings(
        model_id=_required(args, "model_id"),
        revision=args.revision,
        num_shard=args.num_shard,
        hostname=args.hostname,
        port=args.port,
        adapters=parse_lora_adapters(args.lora_adapters or ""),
        threads=args.threads,
        api_key=args.api_key or None,
        log=_log(args),
        flags=vars(args),
    )

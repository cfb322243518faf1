"""Parsed flags to the settings of each process; whatever can be checked before a process starts is checked here."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from pathlib import Path

from chunkwise.config.adapters import parse_lora_adapters
from chunkwise.config.flags import InvalidFlags
from chunkwise.config.policy import SteeringPolicy, load_policy
from chunkwise.config.settings import (
    QUANTIZE,
    FrontSettings,
    Limits,
    LogSettings,
    ParallelSettings,
    RouterSettings,
    ServeSettings,
    ShardSettings,
    WatermarkSettings,
)

_LOG_LEVELS = ("TRACE", "DEBUG", "INFO", "SUCCESS", "WARN", "WARNING", "ERROR", "CRITICAL", "OFF")
_MAY_BE_ZERO = ("max_stop_sequences", "max_top_n_tokens")


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
    if args.quantize not in (None, "", *QUANTIZE):
        raise InvalidFlags(
            f"--quantize is {args.quantize!r}; use {' or '.join(QUANTIZE)}, or leave it out and serve the weights as "
            "they are"
        )
    if args.quantize and args.dtype not in (None, "float32"):
        raise InvalidFlags(f"--quantize {args.quantize} computes in float32, not in {args.dtype}; leave --dtype out")
    for name in ("max_active_adapters", "max_batch_total_tokens", "threads"):
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
        kv_growth_reserve=args.kv_growth_reserve,
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
        quantize=args.quantize or None,
        adapter_slots=args.max_active_adapters,
        adapters=parse_lora_adapters(args.lora_adapters or ""),
        max_batch_total_tokens=args.max_batch_total_tokens,
        prefix_caching=not args.disable_prefix_caching,
        prefill_logprobs=args.enable_prefill_logprobs,
        watermark=_watermark(args),
        threads=args.threads,
        cuda_graphs=args.record_cuda_graphs,
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

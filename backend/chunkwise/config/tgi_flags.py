"""The command line and environment of TGI's ``text-generation-server``, as its launcher uses them.

Every flag of the reference is known. What cannot be honoured is refused if the answers would be wrong without it, and
otherwise noted (`TgiServeSettings.notes`).
"""

from __future__ import annotations

import argparse
from argparse import BooleanOptionalAction
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chunkwise.config.adapters import parse_lora_adapters
from chunkwise.config.flags import InvalidFlags
from chunkwise.config.policy import load_policy
from chunkwise.config.settings import AdapterSource, LogSettings, ParallelSettings, Quantize

_LEVELS = ("TRACE", "DEBUG", "INFO", "SUCCESS", "WARN", "WARNING", "ERROR", "CRITICAL", "OFF")
_QUANTIZE = (
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "exl2",
    "gptq",
    "marlin",
    "awq",
    "compressed-tensors",
    "eetq",
    "fp8",
)
# Formats that TGI makes of a plain checkpoint while it loads, and ours of as many bits.
_QUANTIZED: dict[str, Quantize] = {
    "bitsandbytes": "int8",
    "eetq": "int8",
    "bitsandbytes-nf4": "int4",
    "bitsandbytes-fp4": "int4",
}
_PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class TgiServeSettings:
    """``text-generation-server serve``: one tensor-parallel rank.

    ``uds_path`` is the socket path without the rank's suffix; ``plain`` serves shards without a steering router;
    ``notes`` tell what was asked for and is not done.
    """

    model_id: str
    revision: str | None
    uds_path: str
    parallel: ParallelSettings
    dtype: str | None = None
    quantize: Quantize | None = None
    adapters: tuple[AdapterSource, ...] = ()
    prefill_logprobs: bool = False
    threads: int | None = None
    policy: Path | None = None
    plain: bool = False
    notes: tuple[str, ...] = ()
    log: LogSettings = field(default_factory=LogSettings)


@dataclass(frozen=True, slots=True)
class TgiDownloadSettings:
    """``text-generation-server download-weights``. ``base_model`` is TGI's ``--merge-lora``: what is fetched is to be
    served as a model, not as an adapter."""

    model_id: str
    revision: str | None
    extension: str = ".safetensors"
    base_model: bool = False
    log: LogSettings = field(default_factory=LogSettings)


def tgi_settings(argv: Sequence[str] | None, env: Mapping[str, str]) -> TgiServeSettings | TgiDownloadSettings:
    """Settings of the sub-command in ``argv`` (None: the process's own arguments).

    Raises:
        InvalidFlags, InvalidAdapters, InvalidPolicy: a flag or variable that cannot be used.
    """
    args = _parser().parse_args(argv)
    log = LogSettings(level=args.logger_level.upper(), json_output=args.json_output)
    if args.command == "serve":
        return _serve_settings(args, env, log)
    return TgiDownloadSettings(args.model_id, args.revision, args.extension, args.merge_lora, log)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "text-generation-server", description="ChunkWise in place of TGI's model server.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve one shard, as TGI's launcher asks for it", allow_abbrev=False)
    _common_flags(serve)
    serve.add_argument("--uds-path", default="/tmp/text-generation-server", help="socket path without its -RANK")
    serve.add_argument("--sharded", action=BooleanOptionalAction, default=False, help=f"needs {', '.join(_PLACE)}")
    serve.add_argument("--quantize", choices=_QUANTIZE, help="bitsandbytes and eetq: 8-bit weights; others are refused")
    serve.add_argument("--speculate", type=int, help="ignored: one token per step")
    serve.add_argument("--dtype", choices=("float16", "bfloat16"), help="data type of weights and KV cache")
    serve.add_argument("--kv-cache-dtype", choices=("fp8_e4m3fn", "fp8_e5m2"), help="ignored: the policy decides")
    serve.add_argument("--max-input-tokens", type=int, help="ignored: the router names it in Warmup")
    serve.add_argument("--otlp-endpoint", help="ignored: no traces are sent")
    serve.add_argument("--otlp-service-name", default="text-generation-inference.server", help="ignored")
    serve.add_argument(
        "--plain-shards",
        action="store_true",
        help="serve shards without the steering router [env: CHUNKWISE_PLAIN_SHARDS]",
    )
    download = commands.add_parser("download-weights", help="fetch a model or an adapter", allow_abbrev=False)
    _common_flags(download)
    download.add_argument("--extension", default=".safetensors", help="file name ending of the weights")
    download.add_argument("--auto-convert", action=BooleanOptionalAction, default=True, help="ignored: no pickles")
    download.add_argument("--merge-lora", action=BooleanOptionalAction, default=False, help="it is a base model")
    return parser


def _common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_id", help="directory of a Hugging Face LLaMA checkpoint, or its id on the Hub")
    parser.add_argument("--revision", help="Hub revision: a branch, a tag or a commit")
    parser.add_argument("--logger-level", type=str.upper, choices=_LEVELS, default="INFO")
    parser.add_argument("--json-output", action=BooleanOptionalAction, default=False, help="logs as JSON lines")
    parser.add_argument(
        "--trust-remote-code", action=BooleanOptionalAction, default=False, help="ignored: no such code is ever run"
    )


def _serve_settings(args: argparse.Namespace, env: Mapping[str, str], log: LogSettings) -> TgiServeSettings:
    if args.quantize not in (None, *_QUANTIZED):
        raise InvalidFlags(
            f"--quantize is {args.quantize!r}; of TGI's formats there are {', '.join(_QUANTIZED)}, as "
            "weights of as many bits; use one of them or serve the original checkpoint without it"
        )
    _refuse_rope(env)
    policy = env.get("CHUNKWISE_POLICY") or None
    if policy is not None:
        load_policy(Path(policy))  # a bad file is refused before a model is loaded
    return TgiServeSettings(
        model_id=args.model_id,
        revision=args.revision,
        uds_path=args.uds_path,
        parallel=_place(env) if args.sharded else ParallelSettings(),
        # Such weights are computed with in float32, whatever type TGI's launcher adds.
        dtype=None if args.quantize else args.dtype,
        quantize=_QUANTIZED.get(args.quantize),
        adapters=parse_lora_adapters(env.get("LORA_ADAPTERS", "")),
        prefill_logprobs=_is_on(env, "REQUEST_LOGPROBS"),
        threads=_threads(env),
        policy=Path(policy) if policy is not None else None,
        plain=args.plain_shards or _is_on(env, "CHUNKWISE_PLAIN_SHARDS"),
        notes=tuple(_notes(args, env)),
        log=log,
    )


def _is_on(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() in ("1", "true")


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError as error:
        raise InvalidFlags(f"environment variable {name} is {env[name]!r}; it must be an integer") from error


def _threads(env: Mapping[str, str]) -> int | None:
    """What OpenMP was told, whose value may be a list with one number for each nesting level."""
    first = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None


def _place(env: Mapping[str, str]) -> ParallelSettings:
    missing = [name for name in _PLACE if not env.get(name)]
    if missing:
        raise InvalidFlags(f"--sharded needs {', '.join(missing)} in the environment, as TGI's launcher sets them")
    rank, world_size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise InvalidFlags(f"RANK is {rank} and WORLD_SIZE {world_size}; the rank must lie in 0..{world_size - 1}")
    return ParallelSettings(rank, world_size, env["MASTER_ADDR"], _integer(env, "MASTER_PORT"))


def _refuse_rope(env: Mapping[str, str]) -> None:
    """Positions that are not scaled as asked would answer wrongly without a sign."""
    factor = env.get("ROPE_FACTOR") or "1"
    try:
        neutral = float(factor) == 1.0
    except ValueError as error:
        raise InvalidFlags(f"environment variable ROPE_FACTOR is {factor!r}; it must be a number") from error
    if not neutral:
        raise InvalidFlags(
            f"ROPE_SCALING={env.get('ROPE_SCALING', 'linear')} with ROPE_FACTOR={factor} is not implemented; "
            "write rope_scaling into the model's config.json instead"
        )


def _notes(args: argparse.Namespace, env: Mapping[str, str]) -> list[str]:
    notes = []
    if args.speculate:
        notes.append(f"--speculate {args.speculate} is ignored: one token is generated per step")
    if args.kv_cache_dtype is not None:
        notes.append(f"--kv-cache-dtype {args.kv_cache_dtype} is ignored: the steering policy decides how KV is stored")
    if args.otlp_endpoint:
        notes.append("--otlp-endpoint is ignored: no traces are sent")
    fraction = env.get("CUDA_MEMORY_FRACTION") or "1"
    if fraction not in ("1", "1.0"):
        notes.append(f"CUDA_MEMORY_FRACTION={fraction} is ignored: set MAX_BATCH_TOTAL_TOKENS to size the KV cache")
    if env.get("WEIGHTS_CACHE_OVERRIDE"):
        notes.append("WEIGHTS_CACHE_OVERRIDE is ignored: give the model's directory instead of its id")
    return notes

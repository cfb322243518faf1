"""What each process is told at start: frozen values, built once by `flags`, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from chunkwise.config.policy import SteeringPolicy

Quantize = Literal["int8", "int4"]
QUANTIZE: tuple[Quantize, ...] = get_args(Quantize)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """One entry of ``--lora-adapters``: the name clients use, and a directory or Hub id with its revision."""

    name: str
    source: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the router accepts. Token limits left None are taken from the model in Warmup, a step's from the device.

    ``kv_growth_reserve`` is how many tokens of its answer to come each running request has KV pages kept free for.
    """

    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_prefill_tokens: int | None = None
    max_batch_size: int | None = None
    kv_growth_reserve: int = 64
    max_client_batch_size: int = 4
    payload_limit: int = 2_000_000
    disable_grammar_support: bool = False

    @property
    def step_tokens(self) -> int:
        """Most tokens computed in one step; TGI's default if nothing else was chosen."""
        return 4096 if self.max_batch_prefill_tokens is None else self.max_batch_prefill_tokens


@dataclass(frozen=True, slots=True)
class LogSettings:
    """``json_output`` writes loguru-shaped JSON lines, as TGI's launcher expects of its children."""

    level: str = "INFO"
    json_output: bool = False


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Everything the router process needs. ``policy`` None serves plain full-rank LoRA.

    ``startup_seconds`` is how long it waits for its shards, ``grace_seconds`` how long running requests may take to end
    after SIGTERM.
    """

    model_id: str
    model_dir: Path
    shard_urls: tuple[str, ...]
    hostname: str = "0.0.0.0"
    port: int = 3000
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    policy: SteeringPolicy | None = field(default_factory=SteeringPolicy)
    startup_seconds: float = 600.0
    grace_seconds: float = 60.0
    log: LogSettings = field(default_factory=LogSettings)


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """Everything the generate.v3 door of a router needs.

    ``listen`` is the address to serve a TGI router on ("unix://path" or "host:port"); an adapter id equal to
    ``model_id``, or to its last part, means the base model. ``policy`` None serves plain full-rank LoRA.
    """

    model_id: str
    model_dir: Path
    listen: str
    shard_urls: tuple[str, ...]
    policy: SteeringPolicy | None = field(default_factory=SteeringPolicy)
    startup_seconds: float = 600.0
    log: LogSettings = field(default_factory=LogSettings)


@dataclass(frozen=True, slots=True)
class ParallelSettings:
    """Place of this process in the tensor-parallel group (the environment of torchrun)."""

    rank: int = 0
    world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500


@dataclass(frozen=True, slots=True)
class WatermarkSettings:
    """Requests with a watermark raise the scores of a share ``gamma`` of the vocabulary by ``delta``; TGI's values."""

    gamma: float = 0.5
    delta: float = 2.0


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """Everything a shard process needs.

    ``urls`` lists the listening address of every shard, by rank ("unix://path" or "host:port"). ``quantize`` keeps the
    base matrices in 8 or 4 bits. ``adapter_slots`` is how many adapters stay in memory
    (None: all). ``max_batch_total_tokens`` sizes the KV cache (None: from the memory that is free at
    Warmup).
    """

    model_id: str
    urls: tuple[str, ...]
    revision: str | None = None
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    dtype: str | None = None
    quantize: Quantize | None = None
    adapters: tuple[AdapterSource, ...] = ()
    adapter_slots: int | None = None
    max_batch_total_tokens: int | None = None
    prefix_caching: bool = True
    prefill_logprobs: bool = False
    watermark: WatermarkSettings = field(default_factory=WatermarkSettings)
    threads: int | None = None
    cuda_graphs: bool = False
    log: LogSettings = field(default_factory=LogSettings)


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What the launcher needs; ``flags`` are all parsed flags by name, to be passed on to the processes it starts."""

    model_id: str
    revision: str | None
    num_shard: int
    hostname: str
    port: int
    adapters: tuple[AdapterSource, ...]
    threads: int | None
    api_key: str | None
    log: LogSettings
    flags: Mapping[str, object]

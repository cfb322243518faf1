"""How a run is steered: not at all, at one fixed rung, or by a policy. All but the first go through the controller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chunkwise.config.policy import KvPolicy, RankPolicy, SteeringPolicy, load_policy
from chunkwise.core import AdapterInfo, ChunkwiseError


class InvalidMode(ChunkwiseError):
    """A steering mode that is unknown or does not fit the adapter."""


@dataclass(frozen=True, slots=True)
class SteeringMode:
    """``adapter`` is the resident adapter that all sequences use (None: the base model); ``policy`` steers them (None:
    no steering, which is plain LoRA at full rank with an uncompressed KV cache). ``name`` is for people."""

    name: str
    adapter: str | None = None
    policy: SteeringPolicy | None = None


BASE = SteeringMode("base")


def fixed_rung(rung: int, adapter: AdapterInfo) -> SteeringMode:
    """Every token, the prompt's too, at one rung, by the same decisions as an adaptive run; the KV cache stays full.

    Raises:
        InvalidMode: the adapter's ladder has no such rung.
    """
    if rung not in adapter.rungs:
        raise InvalidMode(f"adapter {adapter.adapter_id!r} has no rung {rung}; its rungs are {adapter.rungs}")
    # Below a complexity of 1, which the estimator never reaches, the adapter is skipped.
    rank = RankPolicy(min_rank=max(rung, 1), max_rank=max(rung, 1), skip_below=1.0 if rung == 0 else 0.0, crossfade=0)
    return SteeringMode(f"rung={rung}", adapter.adapter_id, SteeringPolicy(rank=rank, kv=KvPolicy(kind="full")))


def parse_mode(text: str, adapter: AdapterInfo | None) -> SteeringMode:
    """``base``, ``full``, ``rung=K`` or ``policy=FILE.toml``; a policy without an adapter steers the KV cache alone.

    Raises:
        InvalidMode: another word, no adapter where one is needed, or a rung that its ladder lacks.
        InvalidPolicy: the policy file cannot be used.
    """
    kind, _, value = text.partition("=")
    if text == "base":
        return BASE
    if kind == "policy" and value:
        return SteeringMode("policy", adapter.adapter_id if adapter else None, load_policy(Path(value)))
    if text != "full" and not (kind == "rung" and value.isdecimal()):
        raise InvalidMode(f"mode is {text!r}; use base, full, rung=K or policy=FILE.toml")
    if adapter is None:
        raise InvalidMode(f"mode {text!r} needs an adapter; give --adapter NAME=DIR, or use --mode base")
    return SteeringMode("full", adapter.adapter_id) if text == "full" else fixed_rung(int(value), adapter)

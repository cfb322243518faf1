"""How a run is steered: not at all, at one fixed rung, or by a policy. All but the first go through the controller."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from chunkwise.config.policy import KvPolicy, RankPolicy, SteeringPolicy, load_policy
from chunkwise.core import AdapterInfo, ChunkwiseError, rank_budget
from chunkwise.steering import check_sections


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


def fixed_rung(rung: float, adapter: AdapterInfo) -> SteeringMode:
    """Every token, the prompt's too, at one rung, by the same decisions as an adaptive run; the KV cache stays full.

    Raises:
        InvalidMode: the adapter's ladder has no such rung.
    """
    if rung not in adapter.rungs:
        raise InvalidMode(f"adapter {adapter.adapter_id!r} has no rung {rung:g}; its rungs are {adapter.rungs}")
    rank = RankPolicy(prompt_rung=rung, answer_rung=rung)
    return SteeringMode(f"rung={rung:g}", adapter.adapter_id, SteeringPolicy(rank=rank, kv=KvPolicy(kind="full")))


def parse_mode(text: str, adapter: AdapterInfo | None) -> SteeringMode:
    """``base``, ``full``, ``rung=K`` or ``policy=FILE.toml``; a policy without an adapter steers the KV cache alone.

    Raises:
        InvalidMode: another word, no adapter where one is needed, a rung that its ladder lacks, or a policy for other
            adapters.
        InvalidPolicy: the policy file cannot be used.
    """
    kind, _, value = text.partition("=")
    if text == "base":
        return BASE
    if kind == "policy" and value:
        return _policy_mode(load_policy(Path(value)), adapter)
    rung = _rung(value) if kind == "rung" else None
    if text != "full" and rung is None:
        raise InvalidMode(f"mode is {text!r}; use base, full, rung=K or policy=FILE.toml")
    if adapter is None:
        raise InvalidMode(f"mode {text!r} needs an adapter; give --adapter NAME=DIR, or use --mode base")
    return SteeringMode("full", adapter.adapter_id) if rung is None else fixed_rung(rung, adapter)


def _policy_mode(policy: SteeringPolicy, adapter: AdapterInfo | None) -> SteeringMode:
    if adapter is None:
        return SteeringMode("policy", None, policy)
    if policy.adapters and check_sections(policy, [adapter]) == sorted(policy.adapters):
        raise InvalidMode(
            f"the policy has sections for {sorted(policy.adapters)}, not for {adapter.adapter_id!r}; name the adapter "
            "so, with --adapter NAME=DIR"
        )
    return SteeringMode("policy", adapter.adapter_id, policy)


def _rung(text: str) -> float | None:
    try:
        rung = float(text)
    except ValueError:
        return None
    return rank_budget(rung) if 0.0 <= rung < math.inf else None

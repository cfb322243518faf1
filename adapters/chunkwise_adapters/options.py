"""What PEFT's ``adapter_config.json`` says about the computation: ranks, scales, and the options we must refuse.

It knows PEFT's option names and their meaning up to PEFT 0.21; it never sees a tensor or a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chunkwise_adapters.errors import BrokenAdapter, UnsupportedAdapter

_COMPUTED = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
_CHECKED = frozenset({"peft_type", "bias", "init_lora_weights"})
# Any value gives the same adapter: descriptions, options of training, options read only together with a refused one.
# velora_config changes the backward pass alone; an initialisation's *_config is ignored without that initialisation.
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    }
)
_REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "aLoRA switches the adapter on inside the prompt",
    "arrow_config": "Arrow routes each token between several adapters",
    "fan_in_fan_out": "the weights are stored transposed, for Conv1D layers",
    "kasa_config": "KaSA truncates the base weights and adds a diagonal between A and B",
    "layer_replication": "the base model's layers are repeated",
    "lora_bias": "B carries a bias",
    "megatron_config": "the adapter belongs to Megatron's parallel layers",
    "modules_to_save": "whole modules of the base model are replaced",
    "monteclora_config": "MonteCLoRA samples the adapter's weights",
    "target_parameters": "parameters that are no linear layers are adapted",
    "trainable_token_indices": "rows of the embedding are replaced",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "use_dora": "DoRA renormalises the base weights",
    "use_qalora": "QA-LoRA pools the inputs of A",
}
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """The options that enter the computation, with defaults and per-module overrides still apart."""

    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]

    def rank_and_scale(self, module_path: str) -> tuple[int, float]:
        """Trained rank r and scale of one module: alpha / r, or alpha / sqrt(r) when rank-stabilised (rsLoRA).

        ``module_path`` is the module's dotted name in the base model. As in PEFT (``get_pattern_key``), the first
        pattern in file order that matches the end of the path, after a dot or at its start, wins.
        """
        rank = next((value for pattern, value in self.rank_pattern if pattern.match(module_path)), self.rank)
        alpha = next((value for pattern, value in self.alpha_pattern if pattern.match(module_path)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def parse_options(config: Any, name: str) -> LoraOptions:
    """The options of the adapter called ``name`` from its decoded ``adapter_config.json``.

    Raises:
        UnsupportedAdapter: another PEFT method, or an active option that plain LoRA cannot express.
        BrokenAdapter: not an object, a missing rank or alpha, or a value of the wrong type or range.
    """
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise BrokenAdapter(f"adapter {name!r}: adapter_config.json holds a {kind}; an object is expected")
    _refuse_unsupported(config, name)
    _refuse_initialisation(config.get("init_lora_weights", True), name)
    rank_stabilised = config.get("use_rslora") or False
    if not isinstance(rank_stabilised, bool):
        raise BrokenAdapter(f"adapter {name!r}: use_rslora is {rank_stabilised!r}; true or false is expected")
    return LoraOptions(
        rank=_rank(config.get("r"), "r", name),
        alpha=_alpha(config.get("lora_alpha"), "lora_alpha", name),
        rank_stabilised=rank_stabilised,
        rank_pattern=tuple(
            (regex, _rank(value, f"rank_pattern[{key!r}]", name))
            for key, regex, value in _patterns(config, "rank_pattern", name)
        ),
        alpha_pattern=tuple(
            (regex, _alpha(value, f"alpha_pattern[{key!r}]", name))
            for key, regex, value in _patterns(config, "alpha_pattern", name)
        ),
    )


def _refuse_unsupported(config: Mapping[str, Any], name: str) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"adapter {name!r}: peft_type is {config.get('peft_type')!r}; only 'LORA' is served")
    if config.get("bias", "none") not in ("none", None):
        raise UnsupportedAdapter(
            f"adapter {name!r}: bias is {config['bias']!r}, it changes the base model's biases; train with bias='none'"
        )
    for option, value in config.items():
        if not value or option in _COMPUTED or option in _CHECKED or option in _INERT:
            continue
        reason = _REFUSED.get(option, "this server does not know the option, so it may change the computation")
        raise UnsupportedAdapter(f"adapter {name!r}: {option} is {value!r}: {reason}; only plain LoRA is served")


def _refuse_initialisation(init: Any, name: str) -> None:
    """Some initialisations move a part of the base weights into the adapter, which then fits only the changed base."""
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS):
        return
    known = isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS)
    reason = "changes the base weights when training starts" if known else "is unknown and may change the base weights"
    raise UnsupportedAdapter(
        f"adapter {name!r}: init_lora_weights is {init!r}, which {reason}, and the files hold only the adapter; "
        "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) where PEFT can"
    )


def _rank(value: Any, option: str, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BrokenAdapter(f"adapter {name!r}: {option} is {value!r}; an integer of at least 1 is expected")
    return value


def _alpha(value: Any, option: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BrokenAdapter(f"adapter {name!r}: {option} is {value!r}; a finite number is expected")
    return float(value)


def _patterns(config: Mapping[str, Any], option: str, name: str) -> list[tuple[str, re.Pattern[str], Any]]:
    table = config.get(option) or {}
    if not isinstance(table, dict):
        raise BrokenAdapter(f"adapter {name!r}: {option} is {table!r}; an object is expected")
    try:
        return [(key, re.compile(rf"(.*\.)?({key})$"), value) for key, value in table.items()]
    except re.error as error:
        raise BrokenAdapter(f"adapter {name!r}: {option} holds an invalid regular expression: {error}") from error

"""A section of a policy file as TOML for people: what each number is, and which token a row of prices is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from chunkwise.config.adapter_policy import AdapterPolicy


def section_text(name: str, section: AdapterPolicy, notes: Sequence[str], token_text: Callable[[int], str]) -> str:
    """The section of the adapter ``name``; ``notes`` stand before it as comments. `parse_policy` reads it back."""
    key = json.dumps(name)
    lines = [*(f"# {note}".rstrip() for note in notes), f"[adapters.{key}]"]
    lines += [
        f'content_hash = "{section.content_hash}"',
        f"rungs = {list(section.rungs)}",
        f"kept_energy = {list(section.kept_energy)}",
        f"answer_rung = {section.answer_rung}  # from the prompt's last token on",
    ]
    if section.prompt_rung is not None:
        lines.append(f"prompt_rung = {section.prompt_rung}")
    if section.prices is not None:
        lines.append(f"price_per_rank = {section.price_per_rank!r}  # nats per token and rank")
    if section.min_length is not None:
        lines.append(f"min_length = {section.min_length}  # fewest tokens of a prompt chunk")
    if section.scales is not None:
        lines.append(f"scales = {list(section.scales)}")
    if section.answer_tokens:
        lines += [
            "answer_tokens = [  # of the answer's chunk: token id, rung",
            *(f"  {[i, rung]},  # {_comment(token_text(i))}" for i, rung in section.answer_tokens.items()),
            "]",
        ]
    if section.prices is not None:
        lines += [
            "",
            f"[adapters.{key}.prices]  # nats that a prompt token loses at each rung",
            f"default = {list(section.prices.default)}",
            "tokens = [",
            *(f"  {[i, *row]},  # {_comment(token_text(i))}" for i, row in section.prices.tokens.items()),
            "]",
        ]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """In quotes, control characters escaped: none may end the comment."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

"""Text to token ids and back with the checkpoint's own ``tokenizer.json``. Used by router and shards alike, so that
both count the same tokens; imports neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from chunkwise.core import UnsupportedModel
from chunkwise.heap import trim_heap


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error
    return document


class Tokenizer:
    """A checkpoint's tokenizer.

    Raises:
        UnsupportedModel: the directory holds no readable ``tokenizer.json``.
    """

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedModel(
                f"{path} is missing; write one with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise UnsupportedModel(f"{path} cannot be read: {error}") from error
        # Half of what reading it took is free again.
        trim_heap()
        # A checkpoint may ship truncation or padding settings; a server must see the whole text.
        self._fast.no_truncation()
        self._fast.no_padding()
        added = self._fast.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        self.eos_ids = self._read_eos_ids(model_dir)

    def _read_eos_ids(self, model_dir: Path) -> frozenset[int]:
        """All end-of-sequence ids: generation_config.json's, else config.json's, else the tokenizer's own."""
        for name in ("generation_config.json", "config.json"):
            value = _json(model_dir / name).get("eos_token_id")
            if isinstance(value, int):
                return frozenset([value])
            if isinstance(value, list) and value:
                return frozenset(int(id) for id in value)
        token = _json(model_dir / "tokenizer_config.json").get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        id = self._fast.token_to_id(text) if isinstance(text, str) else None
        return frozenset() if id is None else frozenset([id])

    def encode(self, text: str, *, add_special_tokens: bool = True, truncate: int = 0) -> list[int]:
        """Token ids of ``text``; ``truncate`` keeps the last that many ids, special ones included (0: all), as a
        Hugging Face tokenizer with ``truncation_side="left"`` does."""
        # encode_batch, unlike encode, works without the interpreter lock, so other threads go on meanwhile.
        (encoding,) = self._fast.encode_batch([text], add_special_tokens=False)
        if truncate:
            special = self._fast.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
            keep = max(truncate - special, 0)
            if keep < len(encoding.ids):
                encoding.truncate(keep, direction="left")
        ids: list[int] = self._fast.post_process(encoding, add_special_tokens=add_special_tokens).ids
        return ids[-truncate:] if truncate else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=False)
        return text

    def offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        """Id, text, start and end (in characters) of every token of ``text``."""
        (encoding,) = self._fast.encode_batch([text])
        return [
            (id, text[start:stop], start, stop)
            for id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def is_special(self, id: int) -> bool:
        """Whether ``id`` is a control token that generated text leaves out."""
        return id in self._special

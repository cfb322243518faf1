"""Incremental detokenisation and stop sequences of one request."""

from __future__ import annotations

from collections.abc import Sequence

from chunkwise.tokenizer import Tokenizer

# Enough context for a decoder that looks back (byte-level BPE, SentencePiece); TGI uses the same number.
_CONTEXT = 5
_INCOMPLETE = "�"


class Detokenizer:
    """Turns ids into text as they come.

    A token whose bytes do not yet end a character yields "" and its text follows with a later token, so the texts of a
    request's tokens always concatenate to the whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop_sequences: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._prefix = 0
        self._read = len(self._ids)
        self._stop_sequences = stop_sequences
        self._longest_stop = max((len(s) for s in stop_sequences), default=0)
        self._texts: list[str] = []
        self._tail = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """All generated text so far, special tokens left out."""
        return "".join(self._texts)

    def append(self, id: int) -> str:
        """Text that ``id`` completes; sets ``stopped`` once the texts of all tokens, special ones included, contain a
        stop sequence."""
        self._ids.append(id)
        before = self._tokenizer.decode(self._ids[self._prefix : self._read])
        after = self._tokenizer.decode(self._ids[self._prefix :])
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        text = after[len(before) :]
        self._ids = self._ids[self._read :]
        self._prefix, self._read = 0, len(self._ids)
        if not self._tokenizer.is_special(id):
            self._texts.append(text)
        self._search(text)
        return text

    def _search(self, text: str) -> None:
        if not self._longest_stop:
            return
        window = self._tail + text
        self.stopped = self.stopped or any(stop in window for stop in self._stop_sequences)
        self._tail = window[-(self._longest_stop - 1) :] if self._longest_stop > 1 else ""

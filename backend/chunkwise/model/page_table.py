"""Where the pages of decoding sequences lie, as the GPU reads it. Knows nothing of attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from chunkwise.core import KvFormat
from chunkwise.kv.pages import PageRef


class PageTable:
    """Where the pages of up to ``sequences`` sequences lie, on the device, at addresses that never change.

    ``numbers`` int32 [S, width] in the pool of their format; ``formats`` int8 [S, width], as `KvFormat`; ``contexts``
    int32 [S], the tokens to attend over. ``mixed`` says whether `load` may bring other pages than full ones.
    """

    def __init__(self, sequences: int, width: int, mixed: bool, device: torch.device) -> None:
        self.mixed = mixed
        self.numbers = torch.zeros((sequences, width), dtype=torch.int32, device=device)
        self.formats = torch.zeros((sequences, width), dtype=torch.int8, device=device)
        self.contexts = torch.ones(sequences, dtype=torch.int32, device=device)

    def load(self, pages: Sequence[Sequence[PageRef]], contexts: Sequence[int]) -> None:
        """Replace the contents by the tables of as many sequences or fewer. A missing one reads one token of page 0."""
        sequences, width = self.numbers.shape
        longest = max(map(len, pages), default=0)
        assert len(pages) <= sequences and longest <= width, f"{len(pages)} tables of {longest} pages do not fit"
        numbers = np.zeros((sequences, longest), dtype=np.int32)
        formats = np.zeros((sequences, longest), dtype=np.int8)
        for row, table in enumerate(pages):
            numbers[row, : len(table)] = [page.number for page in table]
            formats[row, : len(table)] = [page.format for page in table]
        assert self.mixed or not formats.any(), "a table of full pages alone got others"
        self.numbers[:, :longest].copy_(torch.from_numpy(numbers))
        if self.mixed:
            self.formats[:, :longest].copy_(torch.from_numpy(formats))
        padded = [*contexts, *[1] * (sequences - len(contexts))]
        self.contexts.copy_(torch.tensor(padded, dtype=torch.int32))


def has_small_pages(pages: Sequence[PageRef]) -> bool:
    """Whether some page is not a full one."""
    return any(page.format is not KvFormat.FULL for page in pages)


def page_table(pages: Sequence[Sequence[PageRef]], contexts: Sequence[int], device: torch.device) -> PageTable:
    """A table for one step."""
    made = PageTable(len(pages), max(map(len, pages)), any(map(has_small_pages, pages)), device)
    made.load(pages, contexts)
    return made

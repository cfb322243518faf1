"""The adapters of one rank: read, checked, ordered by the saved ladder or a plain one, made resident."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from chunkwise.config.settings import AdapterSource
from chunkwise.core import UnsupportedModel
from chunkwise.heap import trim_heap
from chunkwise.hub import locate
from chunkwise.model.identity import base_hash
from chunkwise.model.loading import target_slices
from chunkwise.model.parallel import Group, plan_shard
from chunkwise.model.spec import ModelSpec, load_spec
from chunkwise_adapters.directory import CONFIG_FILE, WEIGHTS_FILE, FileStamp, file_stamp
from chunkwise_adapters.errors import AdapterError
from chunkwise_adapters.format import load_adapter
from chunkwise_adapters.ladder import RankLadder, build_ladder
from chunkwise_adapters.ladder_file import LADDER_FILE, find_ladder, ladder_digest, load_ladder, ranks_digest
from chunkwise_adapters.store import AdapterStore

logger = logging.getLogger(__name__)

# On a disk, unlike /tmp on many systems.
_SPILL_DIRECTORY = Path.home() / ".cache" / "chunkwise"


def load_adapters(
    sources: Sequence[AdapterSource],
    model_dir: Path,
    group: Group,
    dtype: torch.dtype,
    device: torch.device,
    slots: int | None = None,
) -> AdapterStore:
    """This rank's part of the adapters of the model in ``model_dir``, each with the ladder saved in its directory;
    where there is none, with the plain one and global allocation, which no other ladder beat at any rank on real
    adapters. With ``slots`` all are checked, and the first so many kept in memory; the others lie in a file of this
    process, and are read from their directories again only when something there has changed since.

    The model's weights are not needed. Reading an adapter takes three times its memory for a while, so its best moment
    is before they are there.

    Raises:
        UnsupportedModel: a model, an adapter or its ladder that cannot be served, or the ranks found different ladders.
    """
    spec = load_spec(model_dir)
    slices = target_slices(spec, plan_shard(spec, group.rank, group.world_size))
    store = AdapterStore(slices, dtype, device, slots, _SPILL_DIRECTORY)
    # The last that is asked for stays, so that the first sources are those that are in memory at start.
    for source in reversed(sources):
        start = time.perf_counter()
        directory = locate(source.source, source.revision)
        files = _AdapterFiles(directory, source.name, spec, model_dir)
        try:
            ladder = files.read()
        except AdapterError as error:
            raise UnsupportedModel(f"adapter {source.name!r} cannot be served: {error}") from error
        file = find_ladder(directory, source.name)
        _check_same(ladder, file, group)
        adapter = store.add(ladder, files)
        logger.info(
            "adapter %s: %s ladder%s, %s ranks, rungs %s, %d bytes, %.1f s",
            source.name,
            ladder.kind,
            "" if file is None else f" of {file.name}",
            ladder.allocation,
            ladder.rungs,
            adapter.bytes,
            time.perf_counter() - start,
        )
        # Its factors before they were made resident, and what the SVDs took: more than the adapter itself.
        del ladder
        trim_heap()
    return store


class _AdapterFiles:
    """The directory of one adapter, and how its files looked when they were read."""

    def __init__(self, directory: Path, name: str, spec: ModelSpec, model_dir: Path) -> None:
        self._directory = directory
        self._name = name
        self._spec = spec
        self._model_dir = model_dir
        self._read_at: tuple[FileStamp, ...] | None = None

    def read(self) -> RankLadder:
        """The ladder in the directory, or the plain one. Raises AdapterError or OSError."""
        # Taken first: what is written while the files are read counts as a change.
        stamps = self._stamps()
        weights = load_adapter(self._directory, self._name, self._spec.target_shapes())
        file = find_ladder(self._directory, self._name)
        if file is None:
            ladder = build_ladder(weights, allocation="global")
        else:
            ladder = load_ladder(file, weights, base_hash(self._model_dir))
        self._read_at = stamps
        return ladder

    def unchanged(self) -> bool:
        """Whether the files are those that were read last. Raises AdapterError or OSError."""
        return self._stamps() == self._read_at

    def _stamps(self) -> tuple[FileStamp, ...]:
        names = (CONFIG_FILE, WEIGHTS_FILE, LADDER_FILE)
        return tuple(file_stamp(self._directory, name, self._name) for name in names)


def _check_same(ladder: RankLadder, file: Path | None, group: Group) -> None:
    """All ranks must have read the same ladder, or none: each computes a part of what its factors give, and parts of
    different factors do not add up to an output. Of ladders that each has computed itself only the ranks are compared:
    the last digits of their factors may differ between machines."""
    if group.world_size == 1:
        return
    digest = int((ranks_digest(ladder) if file is None else ladder_digest(ladder))[:15], 16)
    if group.minimum(digest) != -group.minimum(-digest):
        raise UnsupportedModel(
            f"adapter {ladder.name!r}: the shards found different ladders, rank {group.rank} {file or 'none'}; "
            "give all machines the same files"
        )

"""A `RankLadder` as one safetensors file, so that a server need not compute it, and all ranks serve the same one.

A file is never trusted: sizes, types, shapes and numbers are checked, and its factors must multiply to the adapter's
update. Pickle files are never read.

Format: fp32 tensors ``layers.N.TARGET.a`` [R, in], ``.b_t`` [R, out], ``.singular_values`` [R], in a sensitive ladder
``.sensitivity`` [R], and int64 ``.active_ranks`` [rungs] per module; what else there is to know lies as JSON in the
metadata entry `_ENTRY`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chunkwise_adapters.directory import contained_file
from chunkwise_adapters.errors import BrokenLadder, ForeignLadder, InvalidRung
from chunkwise_adapters.format import LoraPair, LoraWeights, ModuleKey
from chunkwise_adapters.ladder import Allocation, LadderKind, LadderModule, RankLadder, assemble_ladder
from chunkwise_adapters.whitening import Calibration

LADDER_FILE = "ladder.safetensors"
_ENTRY = "chunkwise_ladder"
_VERSION = 2
_DTYPES = {"a": "F32", "b_t": "F32", "singular_values": "F32", "sensitivity": "F32", "active_ranks": "I64"}
# What names, types and offsets may take in the header, per tensor and for the rest: several times what they do take.
_HEADER_BYTES_PER_TENSOR, _HEADER_BYTES = 512, 1 << 16
_MOST_RUNGS = 1024
_PROBES = 2
_TOLERANCE, _ROUNDING = 1e-4, 1e-5
_REMEDY = "delete the file, or make it anew with chunkwise ladder"


@dataclass(frozen=True, slots=True)
class _Entry:
    """The metadata entry: what the ladder was made for, and how its ranks were chosen."""

    adapter_hash: str
    base_hash: str
    kind: LadderKind
    calibration: Calibration | None
    allocation: Allocation
    rungs: list[float]

    @property
    def parts(self) -> list[str]:
        """The tensors of every module."""
        return [part for part in _DTYPES if part != "sensitivity" or self.kind == "sensitive"]


def save_ladder(ladder: RankLadder, path: Path, base_hash: str) -> None:
    """Write ``ladder``, made for the base model of identity ``base_hash``, to ``path``; the file appears whole.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for key, module in ladder.modules.items():
        tensors[_name(key, "a")] = module.a
        tensors[_name(key, "b_t")] = module.b_t
        tensors[_name(key, "singular_values")] = module.singular_values
        if module.sensitivity is not None:
            tensors[_name(key, "sensitivity")] = module.sensitivity
        tensors[_name(key, "active_ranks")] = torch.tensor(ladder.active_ranks[key])
    calibration = ladder.calibration
    entry = {
        "version": _VERSION,
        "adapter_hash": ladder.content_hash,
        "base_hash": base_hash,
        "kind": ladder.kind,
        "calibration_hash": None if calibration is None else calibration.text_hash,
        "calibration_tokens": None if calibration is None else calibration.tokens,
        "allocation": ladder.allocation,
        "rungs": ladder.rungs,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, partial, metadata={_ENTRY: json.dumps(entry)})
        partial.replace(path)
    except SafetensorError as error:  # the library reports a full disk or a missing directory so
        raise OSError(f"{partial}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def find_ladder(root: Path, name: str) -> Path | None:
    """The ladder saved in the directory ``root`` of the adapter ``name``; None when there is none.

    Raises:
        BrokenAdapter: it is no regular file or lies outside the directory.
    """
    return contained_file(root.resolve(), LADDER_FILE, name)


def load_ladder(path: Path, weights: LoraWeights, base_hash: str) -> RankLadder:
    """The ladder in the file ``path``, which must be one of ``weights`` on the base model of identity ``base_hash``.

    Raises:
        ForeignLadder: it was made for another adapter, or another base model.
        BrokenLadder: the file cannot be read, is larger than such a ladder can be, has other modules, shapes or types,
            an impossible order of ranks, or factors that do not multiply to the adapter's update.
    """
    where = f"adapter {weights.name!r}: {path}"
    try:
        size = path.stat().st_size
        most = _most_bytes(weights)
        if size > most:
            raise BrokenLadder(f"{where} has {size} bytes; a ladder of this adapter has at most {most}; {_REMEDY}")
        with safe_open(path, framework="pt") as file:
            entry = _parse(file.metadata(), where)
            _check_origin(entry, weights, base_hash, where)
            _check_tensors(file, weights, entry, where)
            # Cloned, because what safe_open returns changes with the file.
            read = {
                (key, part): file.get_tensor(_name(key, part)).clone()
                for key in weights.modules
                for part in entry.parts
            }
    except (SafetensorError, OSError) as error:
        raise BrokenLadder(f"{where} is not a readable safetensors file: {error}; {_REMEDY}") from error
    modules = {
        key: LadderModule(
            read[key, "a"], read[key, "b_t"], read[key, "singular_values"], read.get((key, "sensitivity"))
        )
        for key in weights.modules
    }
    for key, module in modules.items():
        _check_descending(module.singular_values, "singular values", key, where)
        if module.sensitivity is not None:
            _check_descending(module.sensitivity, "sensitivities", key, where)
    try:
        ladder = assemble_ladder(weights, modules, entry.rungs, entry.allocation, entry.calibration)
    except InvalidRung as error:
        raise BrokenLadder(f"{where}: {error}; {_REMEDY}") from error
    active_ranks = {key: tuple(read[key, "active_ranks"].tolist()) for key in weights.modules}
    if list(ladder.rungs) != entry.rungs or ladder.active_ranks != active_ranks:
        raise BrokenLadder(f"{where}: its active ranks are not those of its rungs and singular values; {_REMEDY}")
    _check_product(ladder, weights, where)
    return ladder


def ladder_digest(ladder: RankLadder) -> str:
    """SHA-256 (hex) of all numbers of a ladder: equal on two ranks if and only if they serve the same one."""
    digest = hashlib.sha256(json.dumps([ladder.content_hash, ladder.rungs]).encode())
    for key, module in ladder.modules.items():
        digest.update(json.dumps([*key, *ladder.active_ranks[key], list(module.a.shape)]).encode())
        for tensor in (module.a, module.b_t, module.singular_values, module.sensitivity):
            if tensor is not None:
                digest.update(tensor.numpy().data)
    return digest.hexdigest()


def ranks_digest(ladder: RankLadder) -> str:
    """SHA-256 (hex) of the adapter's content, the rungs and every module's active ranks."""
    ranks = [[*key, *ranks] for key, ranks in ladder.active_ranks.items()]
    return hashlib.sha256(json.dumps([ladder.content_hash, ladder.rungs, ranks]).encode()).hexdigest()


def _name(key: ModuleKey, part: str) -> str:
    return f"layers.{key[0]}.{key[1]}.{part}"


def _shapes(pair: LoraPair, n_rungs: int) -> dict[str, list[int]]:
    (trained_rank, inp), out = pair.a.shape, pair.b.shape[0]
    stored_rank = min(trained_rank, inp, out)
    return {
        "a": [stored_rank, inp],
        "b_t": [stored_rank, out],
        "singular_values": [stored_rank],
        "sensitivity": [stored_rank],
        "active_ranks": [n_rungs],
    }


def _most_bytes(weights: LoraWeights) -> int:
    total = _HEADER_BYTES
    for pair in weights.modules.values():
        for part, shape in _shapes(pair, _MOST_RUNGS).items():
            total += math.prod(shape) * (8 if _DTYPES[part] == "I64" else 4) + _HEADER_BYTES_PER_TENSOR
    return total


def _parse(metadata: dict[str, str] | None, where: str) -> _Entry:
    try:
        fields = json.loads((metadata or {})[_ENTRY])
    except KeyError:
        raise BrokenLadder(f"{where} is no ladder: it has no metadata {_ENTRY!r}; {_REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise BrokenLadder(f"{where}: the metadata {_ENTRY!r} is not valid JSON: {error}; {_REMEDY}") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != _VERSION:
        raise BrokenLadder(f"{where} has format {version!r}; this version reads format {_VERSION}; {_REMEDY}")

    def field(name: str, valid: Callable[[Any], bool]) -> Any:
        value = fields.get(name)
        if not valid(value):
            raise BrokenLadder(f"{where}: {name} is {value!r}; {_REMEDY}")
        return value

    kind: LadderKind = field("kind", get_args(LadderKind).__contains__)
    calibration = None
    if kind != "plain":
        calibration = Calibration(field("calibration_hash", _is_str), field("calibration_tokens", _is_int))
    return _Entry(
        adapter_hash=field("adapter_hash", _is_str),
        base_hash=field("base_hash", _is_str),
        kind=kind,
        calibration=calibration,
        allocation=field("allocation", get_args(Allocation).__contains__),
        rungs=field("rungs", lambda value: isinstance(value, list) and all(map(_is_budget, value))),
    )


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_budget(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_origin(entry: _Entry, weights: LoraWeights, base_hash: str, where: str) -> None:
    for what, made_for, served in (
        ("adapter", entry.adapter_hash, weights.content_hash),
        ("base model", entry.base_hash, base_hash),
    ):
        if made_for != served:
            raise ForeignLadder(
                f"{where} was made for the {what} of content {made_for[:12]!r}, but the one to be served is "
                f"{served[:12]!r}; {_REMEDY}"
            )


def _check_tensors(file: Any, weights: LoraWeights, entry: _Entry, where: str) -> None:
    """Names, types and shapes, from the header alone."""
    expected = {
        _name(key, part): (_DTYPES[part], _shapes(pair, len(entry.rungs))[part])
        for key, pair in weights.modules.items()
        for part in entry.parts
    }
    names = set(file.keys())
    if names != set(expected):
        odd = sorted(names ^ set(expected))
        raise BrokenLadder(
            f"{where}: {len(odd)} tensors are missing or of no module, the first is {odd[0]!r}; {_REMEDY}"
        )
    for name, (dtype, shape) in expected.items():
        part = file.get_slice(name)
        found = (part.get_dtype(), part.get_shape())
        if found != (dtype, shape):
            raise BrokenLadder(f"{where}: {name} is {found}; expected is {(dtype, shape)}; {_REMEDY}")


def _check_descending(values: Tensor, what: str, key: ModuleKey, where: str) -> None:
    descending = bool((values[:-1] >= values[1:]).all()) and bool((values >= 0).all())
    if not descending or not bool(torch.isfinite(values).all()):
        raise BrokenLadder(f"{where}: the {what} of layer {key[0]} {key[1]} are not finite and descending; {_REMEDY}")


def _check_product(ladder: RankLadder, weights: LoraWeights, where: str) -> None:
    """Every module must map a few random inputs as the adapter does: ``B'(A'z) = s·B(A z)`` to fp32 rounding. NaN and
    infinite factors fail as well."""
    generator = torch.Generator().manual_seed(0)
    for key, pair in weights.modules.items():
        module = ladder.modules[key]
        inputs = torch.randn(pair.a.shape[1], _PROBES, generator=generator)
        shrunk = pair.a @ inputs
        wanted = pair.scale * (pair.b @ shrunk)
        error = float((module.b_t.T @ (module.a @ inputs) - wanted).norm())
        # The second term is for updates that nearly cancel: both products round relative to their factors.
        rounding = _ROUNDING * abs(pair.scale) * float(pair.b.norm() * shrunk.norm())
        if not error <= _TOLERANCE * float(wanted.norm()) + rounding:
            raise BrokenLadder(
                f"{where}: the factors of layer {key[0]} {key[1]} do not multiply to the adapter's update; {_REMEDY}"
            )

"""A ladder in numbers: the spectrum by target, and what each rung keeps, loses and takes; as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chunkwise_adapters.format import TARGETS
from chunkwise_adapters.ladder import RankLadder

_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class SpectrumRow:
    """The modules of one target: ``share`` of the whole adapter's energy (squared singular values); medians over the
    layers of the effective rank, e to the entropy of the energy's distribution over ranks (Roy and Vetterli, 2007), and
    of the fewest ranks that hold 90 % and 99 % of a module's energy."""

    target: str
    share: float
    effective_rank: float
    rank_90: float
    rank_99: float


@dataclass(frozen=True, slots=True)
class RungRow:
    """One rung. ``truncation_error`` as in `RankLadder.truncation_errors`; ``parameters`` counts the active rows of
    both factors over all modules, ``fp32_bytes`` is what they take."""

    rung: float
    mean_active_rank: float
    kept_energy: float
    truncation_error: float
    parameters: int
    fp32_bytes: int


def spectrum_rows(ladder: RankLadder) -> list[SpectrumRow]:
    """One row per target that the adapter has, then "all"."""
    energy = {key: module.singular_values.double().numpy() ** 2 for key, module in ladder.modules.items()}
    groups = [(target, [values for key, values in energy.items() if key[1] == target]) for target in TARGETS]
    groups.append(("all", list(energy.values())))
    total = sum(float(values.sum()) for values in energy.values())
    return [_spectrum_row(target, spectra, total) for target, spectra in groups if spectra]


def rung_rows(ladder: RankLadder) -> list[RungRow]:
    """One row per rung."""
    errors = ladder.truncation_errors
    rows = []
    for i, rung in enumerate(ladder.rungs):
        count = sum(ladder.modules[key].cost * ranks[i] for key, ranks in ladder.active_ranks.items())
        kept, mean = ladder.kept_energy[i], ladder.mean_active_rank[i]
        rows.append(RungRow(rung, mean, kept, errors[i], count, count * _FP32_BYTES))
    return rows


def tables(ladder: RankLadder) -> str:
    """Both tables for people."""
    loss = "output error" if ladder.kind == "whitened" else "weight error"
    spectrum = [
        [r.target, f"{r.share:.1%}", f"{r.effective_rank:.1f}", f"{r.rank_90:g}", f"{r.rank_99:g}"]
        for r in spectrum_rows(ladder)
    ]
    rungs = [
        [
            str(r.rung),
            f"{r.mean_active_rank:.2f}",
            f"{r.kept_energy:.4%}",
            f"{r.truncation_error:.4g}",
            f"{r.fp32_bytes / 1e6:.2f}",
        ]
        for r in rung_rows(ladder)
    ]
    return "\n\n".join(
        [
            _table(["target", "energy", "effective rank", "90 % in", "99 % in"], spectrum),
            _table(["rung", "mean rank", "energy kept", loss, "MB in fp32"], rungs),
        ]
    )


def summary(ladder: RankLadder) -> dict[str, Any]:
    """Everything in the tables and where it comes from, ready for JSON."""
    return {
        "adapter": ladder.name,
        "adapter_hash": ladder.content_hash,
        "trained_rank": ladder.trained_rank,
        "modules": len(ladder.modules),
        "kind": ladder.kind,
        "allocation": ladder.allocation,
        "calibration": None if ladder.calibration is None else asdict(ladder.calibration),
        "spectrum": [asdict(row) for row in spectrum_rows(ladder)],
        "rungs": [asdict(row) for row in rung_rows(ladder)],
    }


def _spectrum_row(target: str, spectra: Sequence[NDArray[np.float64]], total: float) -> SpectrumRow:
    return SpectrumRow(
        target=target,
        share=sum(float(values.sum()) for values in spectra) / total if total else 0.0,
        effective_rank=median(map(_effective_rank, spectra)),
        rank_90=median(_ranks_that_hold(values, 0.9) for values in spectra),
        rank_99=median(_ranks_that_hold(values, 0.99) for values in spectra),
    )


def _effective_rank(energy: NDArray[np.float64]) -> float:
    shares = energy[energy > 0] / energy.sum() if energy.any() else np.empty(0)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def _ranks_that_hold(energy: NDArray[np.float64], share: float) -> int:
    return int((np.cumsum(energy) < share * energy.sum()).sum()) + 1 if energy.any() else 0


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]
    )

"""The picture of a ladder. The only module of ``chunkwise ladder`` that needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chunkwise_adapters.format import TARGETS
from chunkwise_adapters.ladder import RankLadder


def draw_ladder(ladder: RankLadder, path: Path) -> None:
    """Writes a PNG: left the singular values of every module, coloured by target, right the energy kept per rung.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    spectrum, energy = figure.subplots(1, 2)
    _draw_spectrum(spectrum, ladder)
    _draw_energy(energy, ladder)
    figure.suptitle(
        f"{ladder.name}: {ladder.kind} ladder, {ladder.allocation} ranks, trained rank {ladder.trained_rank}"
    )
    figure.savefig(path, dpi=120)


def _draw_spectrum(axes: Axes, ladder: RankLadder) -> None:
    for number, target in enumerate(TARGETS):
        colour = f"C{number}"
        spectra = [module.singular_values for key, module in ladder.modules.items() if key[1] == target]
        for spectrum in spectra:
            axes.plot(np.arange(1, len(spectrum) + 1), spectrum.numpy(), color=colour, alpha=0.2, linewidth=0.8)
        if spectra:
            axes.plot([], [], color=colour, label=target)
    if any(bool((module.singular_values > 0).any()) for module in ladder.modules.values()):
        axes.set_yscale("log")
    axes.set_xlabel("rank index")
    axes.set_ylabel("RMS output per direction" if ladder.kind == "whitened" else "singular value of ΔW")
    axes.legend(fontsize="small")


def _draw_energy(axes: Axes, ladder: RankLadder) -> None:
    axes.plot(ladder.rungs, ladder.kept_energy, marker="o", markersize=4)
    axes.set_xscale("symlog", linthresh=1, base=2)
    axes.set_xticks(ladder.rungs, labels=[str(rung) for rung in ladder.rungs])
    axes.set_xlabel("rung: mean rank per module")
    axes.set_ylabel("energy kept")
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)

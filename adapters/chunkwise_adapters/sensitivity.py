"""How much an adapter's ranks matter to the loss, so that a ladder gives rank to the modules where it matters.

Energy is blind to what comes behind a module: a large update may move the loss little. It knows no models and no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkwise_adapters.errors import InvalidCalibration
from chunkwise_adapters.format import LoraWeights, ModuleKey
from chunkwise_adapters.whitening import Calibration


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity:
    """``fisher`` holds, per module, ``E_t[(∂L/∂z_i(t))²]`` [R] in fp64 for the R ranks of its plain ladder, where z_i
    gates rank i of token t, ``y_t += Σ_i z_i(t) b_i (a_i · x_t)``: the diagonal of the empirical Fisher information of
    the gates (LeCun et al., 1989; Molchanov et al., 2019), as a mean over the calibration tokens.
    ``adapter_hash`` is the content hash of the adapter.
    """

    adapter_hash: str
    calibration: Calibration
    fisher: Mapping[ModuleKey, Tensor]

    def check(self, weights: LoraWeights) -> None:
        """Raises InvalidCalibration unless it is of ``weights``, finite, and over at least one token."""
        where = f"adapter {weights.name!r}"
        if self.adapter_hash != weights.content_hash:
            raise InvalidCalibration(
                f"{where}: the sensitivity was measured with the adapter of content {self.adapter_hash[:12]}, not "
                f"{weights.content_hash[:12]}; measure it again"
            )
        if self.calibration.tokens < 1:
            raise InvalidCalibration(f"{where}: the calibration data has no tokens; give more")
        for key, pair in weights.modules.items():
            fisher = self.fisher.get(key)
            expected = (min(pair.trained_rank, pair.a.shape[1], pair.b.shape[0]),)
            if fisher is None or tuple(fisher.shape) != expected:
                shape = None if fisher is None else tuple(fisher.shape)
                raise InvalidCalibration(f"{where}, layer {key[0]} {key[1]}: fisher {shape}; expected is {expected}")
            if not bool(torch.isfinite(fisher).all()):
                raise InvalidCalibration(
                    f"{where}, layer {key[0]} {key[1]}: the gradient is NaN or infinite on the calibration data; leave "
                    "out what the model cannot read"
                )

    def nested(self, key: ModuleKey) -> Tensor:
        """What a module's ranks are worth, fp32 [R]: a rank is taken only with all before it, so it never rises."""
        return torch.cummin(self.fisher[key].float(), 0).values

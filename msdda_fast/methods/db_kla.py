# SPDX-License-Identifier: Apache-2.0
"""DB-KLA (Diffusion Blend): the strength of KL regularisation, chosen at sampling time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msdda_fast.methods.kl_strength import KLStrength
from msdda_fast.methods.model import FusedModel

__all__ = ["DBKLA"]


@dataclass(frozen=True, kw_only=True)
class DBKLA(KLStrength):
    """`eps = (1 - lambda) eps_base + lambda eps_aligned`, then one DDIM step at a common eta.

    Args:
        strength: lambda, usually in [0, 2]; see `KLStrength`.
        objective: The aligned model; see `KLStrength`.
        eta: In [0, 1].
    """

    name: ClassVar[str] = "DB-KLA"
    eta: float = 1.0

    def sample(self, model: FusedModel) -> Tensor:
        """Draw images by DDIM steps of the mixed noise predictions."""
        weights = self.weights(model)
        etas = dict.fromkeys(weights, model.level(self.eta))
        return model.decode(model.generate(weights, etas, fusion="eps", extrapolate=True))

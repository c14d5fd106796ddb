# SPDX-License-Identifier: Apache-2.0
"""DeRaDiff: the strength of KL regularisation chosen while sampling, as a product of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msdda_fast.methods.kl_strength import KLStrength
from msdda_fast.methods.model import BASE, LatentModel

__all__ = ["DeRaDiff"]


@dataclass(frozen=True, kw_only=True)
class DeRaDiff(KLStrength):
    """`p ~ p_base^(1 - lambda) p_aligned^lambda` in every step: means weighed by precision.

    The aligned models keep their own etas. lambda is bounded where the base has the smaller one: a
    positive precision needs `lambda < 1 / (1 - eta_base^2 / eta_aligned^2)`, which is 2.78 for
    etas .8 and 1. Beyond that `InvalidWeights` is raised.

    Args:
        strength: lambda; see `KLStrength`.
        objective: See `KLStrength`.
        base_eta: Of the base, in (0, 1].
    """

    name: ClassVar[str] = "DeRaDiff"
    base_eta: float = 1.0

    def sample(self, model: LatentModel) -> Tensor:
        """See `Method.sample`."""
        etas = {**model.etas, BASE: self.base_eta}
        return model.decode(model.generate(self.weights(model), etas, extrapolate=True))

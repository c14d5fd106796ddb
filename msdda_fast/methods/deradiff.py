# SPDX-License-Identifier: Apache-2.0
"""DeRaDiff: the strength of KL regularisation, chosen at sampling time by a product of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msdda_fast.methods.kl_strength import KLStrength
from msdda_fast.methods.model import BASE, FusedModel

__all__ = ["DeRaDiff"]


@dataclass(frozen=True, kw_only=True)
class DeRaDiff(KLStrength):
    """`p ~ p_base^(1 - lambda) p_aligned^lambda` in every step: means weighted by precision.

    The aligned models keep their own etas. lambda is bounded if the base has the smaller eta: a
    positive precision needs `lambda < 1 / (1 - eta_base^2 / eta_aligned^2)`, which is 2.78 for
    etas 0.8 and 1. Beyond that, `InvalidWeights` is raised.

    Args:
        strength: lambda; see `KLStrength`.
        objective: The aligned model; see `KLStrength`.
        base_eta: The eta of the base, in (0, 1].
    """

    name: ClassVar[str] = "DeRaDiff"
    base_eta: float = 1.0

    def sample(self, model: FusedModel) -> Tensor:
        """Draw images from the product of the kernels of the base and the aligned models."""
        etas = {**model.etas, BASE: model.level(self.base_eta)}
        return model.decode(model.generate(self.weights(model), etas, extrapolate=True))

# SPDX-License-Identifier: Apache-2.0
"""What the methods that interpolate between the base and the aligned models have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

from msdda_fast.errors import InvalidWeights, UnknownObjective
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import BASE, FusedModel

__all__ = ["KLStrength"]


@dataclass(frozen=True, kw_only=True)
class KLStrength(Method):
    """Weight 1 - lambda for the base, lambda for the aligned: the KL weight divided by lambda.

    Args:
        strength: lambda >= 0: 0 is the base, 1 the aligned model, above 1 extrapolates.
        objective: The aligned model; None: all of them, weighted by the preference (a one-hot
            preference selects one).

    Raises:
        InvalidWeights: The strength is negative or not finite.
    """

    strength: float = 1.0
    objective: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise InvalidWeights(f"strength must be at least 0 and finite, got {self.strength!r}")

    def weights(self, model: FusedModel) -> dict[str, float]:
        """Return the weights by model name, summing to 1, without those that are 0.

        Raises:
            UnknownObjective: `objective` is not an aligned model.
        """
        if self.objective is not None and self.objective not in model.etas:
            known = ", ".join(model.etas)
            raise UnknownObjective(f"unknown objective {self.objective!r}; known: {known}")
        aligned = model.preference if self.objective is None else {self.objective: 1.0}
        weights = {BASE: 1 - self.strength}
        for name, w in aligned.items():
            # the base may be an objective too
            weights[name] = weights.get(name, 0.0) + self.strength * w
        return {name: weight for name, weight in weights.items() if weight != 0}

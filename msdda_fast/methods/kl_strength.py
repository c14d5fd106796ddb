# SPDX-License-Identifier: Apache-2.0
"""What the methods share that move between the base and the aligned models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from msdda_fast.errors import InvalidWeights, UnknownObjective
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import BASE, LatentModel

__all__ = ["KLStrength"]


@dataclass(frozen=True, kw_only=True)
class KLStrength(Method):
    """Weight 1 - lambda on the base and lambda on the aligned: the KL weight divided by lambda.

    Args:
        strength: lambda >= 0: 0 is the base, 1 the aligned model, above 1 extrapolates.
        objective: Which aligned model; None: all of them, as the preference has it, which for a
            one-hot preference is that objective's.

    Raises:
        InvalidWeights: A strength that is negative or not finite.
    """

    strength: float = 1.0
    objective: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise InvalidWeights(f"strength must be at least 0 and finite, got {self.strength!r}")

    def weights(self, model: LatentModel) -> dict[str, float]:
        """Weights by name of a model, sum 1, without those of weight 0.

        Raises:
            UnknownObjective: `objective` is no aligned model.
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

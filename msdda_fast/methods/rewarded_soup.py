# SPDX-License-Identifier: Apache-2.0
"""RS (Rewarded Soups): one model with averaged weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msdda_fast.lora.soup import Merge
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import FusedModel

__all__ = ["RewardedSoup"]


@dataclass(frozen=True, kw_only=True)
class RewardedSoup(Method):
    """`theta_w = sum_i w_i theta_i`, sampled as any model: DB-MPA for models linear in theta.

    Args:
        merge: How adapters are merged: "product" averages the updates B A; "factor" averages B and
            A separately, as public code does, and needs adapters of equal rank. See
            `msdda_fast.lora.soup`.
        rotation: Seed of random rotations of the factors, for "factor"; None: as they are. An
            adapter does not determine its factors, and only this merge depends on them.
        remapped: Merge at the weights at which merged predictions are MSDDA's in the limit
            T -> infinity, `effective_weights`, instead of w.
        eta: In [0, 1]; None: eta_w of the objectives' own etas, the noise of MSDDA.
    """

    name: ClassVar[str] = "RS"
    merge: Merge = "product"
    rotation: int | None = None
    remapped: bool = False
    eta: float | None = None

    def sample(self, model: FusedModel) -> Tensor:
        """Draw images of the model with averaged weights."""
        weights = model.remapped()[0] if self.remapped else model.preference
        soup = model.soup(weights, self.merge, self.rotation)
        return model.decode(model.generate({soup: 1.0}, {soup: model.level(self.eta)}))

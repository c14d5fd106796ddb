# SPDX-License-Identifier: Apache-2.0
"""RS (Rewarded Soups): one model with averaged weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from msdda_fast.lora.soup import Merge
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import LatentModel, fused_eta

__all__ = ["RewardedSoup"]


@dataclass(frozen=True, kw_only=True)
class RewardedSoup(Method):
    """`theta_w = sum_i w_i theta_i`, sampled as any model: DB-MPA for models linear in theta.

    Args:
        merge: How adapters are merged: "product" averages the updates B A; "factor" averages B and
            A separately, as public code does, and needs adapters of equal rank. See
            `msdda_fast.lora.soup`.
        eta: In [0, 1]; None: eta_w of the objectives' own etas, the noise of MSDDA.
    """

    name: ClassVar[str] = "RS"
    merge: Merge = "product"
    eta: float | None = None

    def sample(self, model: LatentModel) -> Tensor:
        """Draw images of the model with averaged weights."""
        eta = fused_eta(model) if self.eta is None else self.eta
        soup = model.soup(model.preference, self.merge)
        return model.decode(model.generate({soup: 1.0}, {soup: eta}))

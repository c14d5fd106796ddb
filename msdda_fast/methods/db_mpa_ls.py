# SPDX-License-Identifier: Apache-2.0
"""DB-MPA-LS (Diffusion Blend): DB-MPA at the cost of one model, which is drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msdda_fast.methods.method import Method
from msdda_fast.methods.model import FusedModel

__all__ = ["DBMPALS"]

#: Of `LatentModel.uniform`.
_CHOICE = 1


@dataclass(frozen=True, kw_only=True)
class DBMPALS(Method):
    """In each step, draw one model for each sample, i ~ Categorical(w), and take its DDIM step.

    Equal to DB-MPA on average. The choices add the variance `sum_k G_k^2 Var_w[B_k eps_i]`, where
    G_k is the share of step k that is left in x_0: O(1/T).

    Args:
        eta: The eta of all models, in [0, 1].
    """

    name: ClassVar[str] = "DB-MPA-LS"
    eta: float = 1.0

    def sample(self, model: FusedModel) -> Tensor:
        """Draw images by DDIM steps, each with one randomly drawn model per sample."""
        names = [name for name, weight in model.preference.items() if weight > 0]
        below = torch.tensor([model.preference[name] for name in names[:-1]]).double().cumsum(0)

        def choose(k: int) -> Tensor:
            u = model.uniform(k, purpose=_CHOICE)
            return torch.searchsorted(below.to(u), u, right=True)

        return model.decode(model.switched(names, choose, model.level(self.eta)))

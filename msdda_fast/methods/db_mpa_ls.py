# SPDX-License-Identifier: Apache-2.0
"""DB-MPA-LS (Diffusion Blend): DB-MPA at the cost of one model, which is drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import LatentModel

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

    def sample(self, model: LatentModel) -> Tensor:
        """Draw images by DDIM steps, each with one randomly drawn model per sample."""
        names = [name for name, weight in model.preference.items() if weight > 0]
        x = model.initial()
        for k in range(len(model.grid.timesteps)):
            chosen = self._choose([model.preference[name] for name in names], model, k)
            eps = torch.empty_like(x)
            for i, name in enumerate(names):
                rows = (chosen == i).nonzero().flatten()
                if len(rows):
                    eps[rows] = model.eps(x[rows], k, name, rows)
            x = DDIMStep.of(model.grid, k, self.eta).prev(x, eps, model.noise(k))
        return model.decode(x)

    def _choose(self, weights: list[float], model: LatentModel, k: int) -> Tensor:
        """Draw the index of a model for each sample, (B,)."""
        u = model.uniform(k, purpose=_CHOICE)
        below = torch.tensor(weights[:-1], dtype=u.dtype, device=u.device).cumsum(0)
        return torch.searchsorted(below, u, right=True)

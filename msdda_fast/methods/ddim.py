# SPDX-License-Identifier: Apache-2.0
r"""The DDIM kernel with its parts exposed, for methods that modify the inside of a step.

With `a = alpha_bar_t`, `p = alpha_bar_prev` and `v` the DDPM posterior variance,

    x0hat = (x_t - sqrt(1 - a) eps) / sqrt(a),        sigma^2 = eta^2 v,
    x_prev = sqrt(p) x0hat + sqrt(1 - p - sigma^2) eps + sigma z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from msdda_fast.steps.ddim import DDIMGrid

__all__ = ["DDIMStep"]


@dataclass(frozen=True, slots=True)
class DDIMStep:
    """Step k of a grid at one eta.

    Attributes:
        alpha: alpha_bar_t.
        alpha_prev: alpha_bar_prev.
        var: v, in latent units squared.
        eta: In [0, 1].
        clip_range: x_0 predictions are clamped to [-clip_range, clip_range]; None: no clamping.
    """

    alpha: float
    alpha_prev: float
    var: float
    eta: float
    clip_range: float | None = None

    @classmethod
    def of(cls, grid: DDIMGrid, k: int, eta: float) -> DDIMStep:
        """Return step k = 0, 1, ... of `grid` at `eta`."""
        return cls(
            alpha=float(grid.alpha_bar_t[k]),
            alpha_prev=float(grid.alpha_bar_prev[k]),
            var=float(grid.var[k]),
            eta=eta,
            clip_range=grid.clip_range,
        )

    @property
    def std(self) -> float:
        """sigma, in latent units."""
        return self.eta * math.sqrt(self.var)

    def x0(self, x: Tensor, eps: Tensor) -> Tensor:
        """Return x0hat of latents x, by Tweedie's formula."""
        x_0 = (x - math.sqrt(1 - self.alpha) * eps) / math.sqrt(self.alpha)
        return x_0 if self.clip_range is None else x_0.clamp(-self.clip_range, self.clip_range)

    def mean(self, x: Tensor, eps: Tensor) -> Tensor:
        """Return mu, the mean of x_prev."""
        # 1 - p - sigma^2 >= 0 holds for eta <= 1, up to rounding
        direction = math.sqrt(max(1 - self.alpha_prev - self.std**2, 0.0))
        return math.sqrt(self.alpha_prev) * self.x0(x, eps) + direction * eps

    def prev(self, x: Tensor, eps: Tensor, z: Tensor) -> Tensor:
        """Return x_prev = mu + sigma z."""
        return self.mean(x, eps) + self.std * z

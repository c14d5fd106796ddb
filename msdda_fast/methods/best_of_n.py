# SPDX-License-Identifier: Apache-2.0
"""Best-of-N: of N independent images of a system, the one with the highest r_w."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msdda_fast.levels import ETA
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import LatentModel
from msdda_fast.methods.particles import best, check_counts, initial_particles, score
from msdda_fast.methods.sd import SD

__all__ = ["BestOfDraws", "BestOfN"]


@dataclass(frozen=True, kw_only=True)
class BestOfN(Method):
    """N draws, each with its own x_T and noise; the first is SD's, so that N = 1 is SD.

    Costs per image N T evaluations of the base, N decodes and, for N > 1, N scores.

    Args:
        num_particles: N, at least 1.
        eta: In [0, 1].

    Raises:
        InvalidSchedule: eta outside its range.
        ValueError: N is not a positive integer; while sampling, a reward is NaN.
    """

    name: ClassVar[str] = "Best-of-N"
    needs_rewards: ClassVar[bool] = True
    num_particles: int = 20
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self.name, num_particles=self.num_particles)
        ETA.check_one(self.eta, self.name)

    def sample(self, model: LatentModel) -> Tensor:
        """Draw N images per sample and return the one with the highest r_w, (B, 3, H, W)."""
        if self.num_particles == 1:
            return SD(eta=self.eta).sample(model)
        x = initial_particles(model, self.num_particles)
        for k in range(len(model.grid.timesteps)):
            z = model.noise(k, self.num_particles)
            x = DDIMStep.of(model.grid, k, self.eta).prev(x, model.eps(x, k), z)
        images = model.decode(x)
        return best(images, score(model, images), model.batch_size)


@dataclass(frozen=True, kw_only=True)
class BestOfDraws(Method):
    """The best of N draws of any system that evaluates no rewards itself.

    The first draw is the system's own image. Costs per image N times those of the system, and for
    N > 1 N scores.

    Args:
        of: The system.
        num_draws: N, at least 1.

    Raises:
        ValueError: N is not a positive integer; while sampling, a reward is NaN.
    """

    name: ClassVar[str] = "Best-of-N"
    needs_rewards: ClassVar[bool] = True
    of: Method
    num_draws: int = 2

    def __post_init__(self) -> None:
        check_counts(self.name, num_draws=self.num_draws)

    def sample(self, model: LatentModel) -> Tensor:
        """Draw N images per sample and return the one with the highest r_w, (B, 3, H, W)."""
        draws = []
        for number in range(self.num_draws):
            with model.redraw(number):
                draws.append(self.of.sample(model))
        if self.num_draws == 1:
            return draws[0]
        images = torch.cat(draws)
        return best(images, score(model, images), model.batch_size)

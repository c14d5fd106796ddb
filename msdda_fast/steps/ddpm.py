# SPDX-License-Identifier: Apache-2.0
r"""The DDPM rule, from a diffusers DDPM scheduler with variance_type "fixed_small".

With a = alpha_bar_t, p = alpha_bar_prev and alpha = a / p, formula (7) of 2006.11239 is

    mean = sqrt(p) (1 - alpha) / (1 - a) x0hat + sqrt(alpha) (1 - p) / (1 - a) x,
    tau^2 = (1 - p) / (1 - a) (1 - alpha).

It is DDIM at eta = 1, until x0hat is clipped: DDIM then keeps the unclipped epshat, and DDPM x. It
goes from each timestep to the next in the list, and from the last to alpha_bar = 1, without noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import LevelRange
from msdda_fast.steps.ddim import DDIMGrid, next_grid
from msdda_fast.steps.rules import OneLevelRule, StepTerms, state_step

if TYPE_CHECKING:
    from msdda_fast.types import Scheduler

__all__ = ["DDPMRule", "ddpm_rule"]

#: diffusers draws the same from both.
_VARIANCES = ("fixed_small", "fixed_small_log")


@dataclass(frozen=True, slots=True)
class DDPMRule(OneLevelRule):
    """DDPM on a grid; there is no level to choose.

    Attributes:
        grid: The T steps.
    """

    grid: DDIMGrid

    @property
    def levels(self) -> LevelRange:
        """1 alone: it is DDIM's eta."""
        return LevelRange(name="eta", meaning="fixed by DDPM", low=1.0, high=1.0)

    def step(self, level: Tensor) -> StepTerms:
        """Return the DDPM posteriors, the same for every level."""
        grid = self.grid
        a, p = grid.alpha_bar_t[:, None, None], grid.alpha_bar_prev[:, None, None]
        return state_step(
            grid.step_terms(),
            kept=(a / p).sqrt() * (1 - p) / (1 - a),
            signal=p.sqrt() * (1 - a / p) / (1 - a),
            rate=torch.ones_like(level),
            unit=grid.var[:, None, None].sqrt(),
            clips=grid.clip_range is not None,
        )


def ddpm_rule(scheduler: Scheduler, num_steps: int | None) -> DDPMRule:
    """Read T steps off a DDPM scheduler; None: as its timesteps are set.

    Raises:
        InvalidSchedule: Another variance than "fixed_small", or as `steps.ddim.ddim_grid`.
    """
    if (kind := scheduler.config.variance_type) not in _VARIANCES:
        raise InvalidSchedule(
            f"variance_type is {kind!r}: fused steps need the variance of each objective before "
            f"its network runs; expected one of {_VARIANCES}"
        )
    return DDPMRule(next_grid(scheduler, num_steps, last=-1))

# SPDX-License-Identifier: Apache-2.0
r"""Consistency models: LCM's and TCD's steps, from diffusers' schedulers.

LCM (2310.04378) goes from a = alpha_bar_t to p = alpha_bar_next by renoising a denoised image,

    f = c_skip x + c_out x0hat,     x_prev = sqrt(p) f + sqrt(1 - p) z,

and ends with f itself. TCD (2402.19159) goes down to s = floor((1 - gamma) next) and up to p again,
so that the mean is DDIM's at

    tau^2 = 1 - p / alpha_bar_s,        mean = sqrt(p) x0hat + sqrt(1 - p - tau^2) epshat.

Its last step goes to timestep 0, whatever gamma is, and adds no noise; the limit of the ratios
tau_i / tau_j for small timesteps, sqrt(gamma_i / gamma_j), weighs the objectives there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.levels import LevelRange
from msdda_fast.steps.ddim import DDIMGrid, next_grid
from msdda_fast.steps.rules import (
    GridRule,
    OneLevelRule,
    StepTerms,
    canonical_step,
    state_step,
)

if TYPE_CHECKING:
    from msdda_fast.types import Scheduler

__all__ = ["LCMRule", "TCDRule", "lcm_rule", "tcd_rule"]


@dataclass(frozen=True, slots=True)
class LCMRule(OneLevelRule):
    """LCM on a grid; there is no level to choose.

    Attributes:
        grid: The T steps; the last goes nowhere.
        skip, out: c_skip and c_out of the boundary condition, (T, 1, 1).
    """

    grid: DDIMGrid
    skip: Tensor
    out: Tensor

    @property
    def levels(self) -> LevelRange:
        """1 alone."""
        return LevelRange(name="level", meaning="fixed by LCM", low=1.0, high=1.0)

    def step(self, level: Tensor) -> StepTerms:
        """Return LCM's Gaussians, the same for every level."""
        p = self.grid.alpha_bar_prev[:, None, None].clone()
        p[-1] = 1.0
        return state_step(
            self.grid.step_terms(),
            kept=p.sqrt() * self.skip,
            signal=p.sqrt() * self.out,
            rate=torch.ones_like(level),
            unit=(1 - p).sqrt(),
            clips=self.grid.clip_range is not None,
        )


@dataclass(frozen=True, slots=True)
class TCDRule(GridRule):
    """TCD on a grid; a level is gamma, which diffusers calls eta.

    Attributes:
        grid: The T steps; TCD clips nothing.
        next_timesteps: (T,) float64, 0 at last.
        alpha_bar: (num_train_timesteps,) float64.
    """

    grid: DDIMGrid
    next_timesteps: Tensor
    alpha_bar: Tensor

    @property
    def levels(self) -> LevelRange:
        """Gamma in [0, 1]."""
        return LevelRange(name="gamma", meaning="TCD's stochasticity", low=0.0, high=1.0)

    def step(self, level: Tensor) -> StepTerms:
        """Return TCD's Gaussians at `level`, broadcastable to (T, B, M)."""
        return self.step_at(self._rate(level))

    def step_at(self, rate: Tensor) -> StepTerms:
        """Return the Gaussians of a rate: tau itself, and where there is none, anything."""
        p = self.grid.alpha_bar_prev[:, None, None]
        unit = torch.where(self._is_noisy, 1.0, 0.0).double()
        direction = (1 - p - (rate * unit) ** 2).clamp(min=0).sqrt()
        return canonical_step(
            self.grid.step_terms(),
            signal=p.sqrt(),
            direction=direction,
            rate=rate,
            unit=unit,
            clips=False,
        )

    def eps_scale(self, level: Tensor) -> Tensor:
        """Return |dmean / depshat|, times sqrt(a) to be finite at a = 0."""
        a, p = self.grid.alpha_bar_t[:, None, None], self.grid.alpha_bar_prev[:, None, None]
        tau = self._rate(level) * self._is_noisy
        direction = (1 - p - tau**2).clamp(min=0).sqrt()
        scale = (p * (1 - a)).sqrt() - a.sqrt() * direction
        return torch.where(p == a, 1.0, scale)

    def _rate(self, level: Tensor) -> Tensor:
        after = self.next_timesteps[:, None, None]
        down = self.alpha_bar[((1 - level) * after).floor().long()]
        tau = (1 - self.grid.alpha_bar_prev[:, None, None] / down).clamp(min=0).sqrt()
        return torch.where(self._is_noisy, tau, level.sqrt())

    @property
    def _is_noisy(self) -> Tensor:
        return self.next_timesteps[:, None, None] > 0


def lcm_rule(scheduler: Scheduler, num_steps: int | None) -> LCMRule:
    """Read T steps off an LCM scheduler; None: as its timesteps are set.

    Raises:
        InvalidSchedule: As `steps.ddim.ddim_grid`.
    """
    grid, lcm = next_grid(scheduler, num_steps, last=None), _any(scheduler)
    skip, out = lcm.get_scalings_for_boundary_condition_discrete(grid.timesteps.double())
    return LCMRule(grid, skip[:, None, None], out[:, None, None])


def tcd_rule(scheduler: Scheduler, num_steps: int | None) -> TCDRule:
    """Read T steps off a TCD scheduler; None: as its timesteps are set.

    Raises:
        InvalidSchedule: As `steps.ddim.ddim_grid`.
    """
    grid = next_grid(scheduler, num_steps, last=0)
    after = torch.cat([grid.timesteps[1:], grid.timesteps.new_zeros(1)]).double()
    return TCDRule(grid, after, scheduler.alphas_cumprod.detach().to("cpu", torch.float64))


def _any(scheduler: Scheduler) -> Any:  # noqa: ANN401 - what only one class has
    return scheduler

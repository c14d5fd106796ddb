# SPDX-License-Identifier: Apache-2.0
r"""The SDEs that flow models are trained with: Flow-GRPO's and DanceGRPO's, stepped by Euler.

From t = sigma to r = sigma_next, with d = r - t < 0 and v the output,

    Flow-GRPO (2505.05470):  g = a sqrt(t / (1 - t)),
        mean = (1 + g^2 d / 2t) x + (1 + g^2 (1 - t) / 2t) d v,         tau = g sqrt(-d);
    DanceGRPO (2505.07818):  mean = x + d v - eta^2 d / 2 score,  score = -(x + (1 - t) v) / t,
        so  mean = (1 + eta^2 d / 2t) x + (1 + eta^2 (1 - t) / 2t) d v, tau = eta sqrt(-d),

which is the same with g = eta. At t = 1, g is infinite; there 1 - t is 1 - sigma_max instead.

A and B are affine in tau^2, so Eq. 7 over unequal levels is exactly one step of the same SDE at the
fused level, on a mixture of the velocities (`fusion="eps"` with other words). There is noise in the
last step, and it stays in x_0, unless `FlowNoise.last_step` says no.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from msdda_fast.levels import DanceSDE, FlowSDE, LevelRange
from msdda_fast.steps.flow import FlowRule
from msdda_fast.steps.rules import StepTerms

__all__ = ["DanceSDERule", "FlowSDERule"]


@dataclass(frozen=True)
class _SDERule(FlowRule):
    """Euler's steps of an SDE with diffusion g = level G(t); a rate is the level."""

    @abstractmethod
    def diffusion(self) -> Tensor:
        """G, the diffusion at level 1, (T, 1, 1)."""

    def rate(self, level: Tensor) -> Tensor:
        """Return `level`."""
        return level

    def step_at(self, rate: Tensor) -> StepTerms:
        """Return the SDE's Gaussians."""
        t, length = self.grid.start, self.grid.end - self.grid.start
        diffusion = self.diffusion()
        pull = (rate * diffusion) ** 2 / (2 * t)
        x_scale, output_scale = 1 + pull * length, (1 + pull * (1 - t)) * length
        return StepTerms(x_scale, output_scale, rate, diffusion * (-length).sqrt())


@dataclass(frozen=True)
class FlowSDERule(_SDERule):
    """Flow-GRPO's SDE; a level is a."""

    @property
    def levels(self) -> LevelRange:
        """A >= 0."""
        return FlowSDE.levels

    def diffusion(self) -> Tensor:
        """Return sqrt(t / (1 - t)), with sigma_max for t in the denominator at t = 1."""
        t, sigma_max = self.grid.start, getattr(self.noise, "sigma_max", None)
        # Flow-GRPO's choice is the sigma after; it is 0, and harmless, if the first is the last
        ceiling = self.grid.sigmas[1] if sigma_max is None else sigma_max
        return (t / (1 - torch.where(t == 1, ceiling, t))).sqrt()


@dataclass(frozen=True)
class DanceSDERule(_SDERule):
    """DanceGRPO's SDE; a level is eta."""

    @property
    def levels(self) -> LevelRange:
        """Eta >= 0."""
        return DanceSDE.levels

    def diffusion(self) -> Tensor:
        """Return 1."""
        return torch.ones_like(self.grid.start)

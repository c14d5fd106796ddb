# SPDX-License-Identifier: Apache-2.0
r"""Flow samplers that renoise: coefficients-preserving sampling, and what it is at full noise.

From t = sigma to r = sigma_next (2509.05952),

    tau = r sin(a pi / 2),      mean = (1 - r) x0hat + r cos(a pi / 2) epshat.

The noise of a step is a fixed part of what is there, whatever its size. So unequal levels lose a
fixed part of it, too: one model fused with itself at levels .9 and .4 leaves 2.5 % too little noise
in every step, for any T. `fusion="eps"`, which leaves the right amount, is the default then.

At a = 1 this is diffusers' FlowMatchEulerDiscreteScheduler with stochastic_sampling=True, and
FlowMatchLCMScheduler: (1 - r) x0hat + r z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from msdda_fast.levels import CPS, LevelRange
from msdda_fast.steps.flow import FlowRule
from msdda_fast.steps.rules import StepTerms

__all__ = ["CPSRule", "RenoiseRule"]


@dataclass(frozen=True)
class CPSRule(FlowRule):
    """CPS; a level is a, and its rate sin(a pi / 2)."""

    @property
    def levels(self) -> LevelRange:
        """A in [0, 1]."""
        return CPS.levels

    @property
    def mixes_unless_told(self) -> bool:
        """Yes: smaller steps do not mend what Eq. 7 takes away."""
        return True

    def rate(self, level: Tensor) -> Tensor:
        """Return sin(a pi / 2)."""
        return torch.sin(level * (math.pi / 2))

    def step_at(self, rate: Tensor) -> StepTerms:
        """Return the Gaussians of tau = r rate."""
        r = self.grid.end
        direction = r * (1 - rate**2).clamp(min=0).sqrt()
        return self.grid.canonical_step(direction=direction, rate=rate, unit=r)


@dataclass(frozen=True)
class RenoiseRule(CPSRule):
    """CPS at a = 1, which a scheduler does on its own; there is no level to choose."""

    @property
    def levels(self) -> LevelRange:
        """1 alone."""
        return LevelRange(name="level", meaning="fixed by this scheduler", low=1.0, high=1.0)

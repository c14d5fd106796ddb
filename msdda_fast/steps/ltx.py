# SPDX-License-Identifier: Apache-2.0
r"""Euler ancestral for flow models, as LTX samples (diffusers' LTXEulerAncestralRFScheduler).

From t = sigma to r = sigma_next at eta: Euler's step down to d, and noise up to r again,

    q = 1 + (r / t - 1) eta,     d = r q,     k = (1 - r) / (1 - d),
    mean = k (x - (t - d) v),    tau^2 = r^2 - k^2 d^2.

The rate tau / r depends on the step. It has a limit where r = 0, sqrt(eta (2 - eta)):

    (tau / r)^2 = (1 - r / t) eta (1 + q k) / (1 - r q).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from msdda_fast.levels import LevelRange
from msdda_fast.steps.flow import FlowRule
from msdda_fast.steps.rules import StepTerms

__all__ = ["LTXAncestralRule"]


@dataclass(frozen=True)
class LTXAncestralRule(FlowRule):
    """LTX's Euler ancestral steps; a level is eta.

    Attributes:
        s_noise: Factor on the noise, no unit.
    """

    s_noise: float = 1.0

    @property
    def levels(self) -> LevelRange:
        """Eta in [0, 1]."""
        return LevelRange(name="eta", meaning="LTX's stochasticity", low=0.0, high=1.0)

    def rate(self, level: Tensor) -> Tensor:
        """Return tau / r."""
        t, r = self.grid.start, self.grid.end
        down = 1 + (r / t - 1) * level
        kept = (1 - r) / (1 - r * down)
        return ((1 - r / t) * level * (1 + down * kept) / (1 - r * down)).sqrt()

    def step(self, level: Tensor) -> StepTerms:
        """Return the Gaussians at `level`, broadcastable to (T, B, M)."""
        t, r, level = self.grid.start, self.grid.end, level * self._noisy
        return self._down_to(r * (1 + (r / t - 1) * level), self.rate(level))

    def step_at(self, rate: Tensor) -> StepTerms:
        """Return the Gaussians of a rate: k d = r sqrt(1 - rate^2), solved for d."""
        r, rest = self.grid.end, (1 - rate**2).clamp(min=0).sqrt()
        return self._down_to(r * rest / (1 - r + r * rest), rate)

    def _down_to(self, d: Tensor, rate: Tensor) -> StepTerms:
        t, r = self.grid.start, self.grid.end
        kept = (1 - r) / (1 - d)
        return StepTerms(kept, -kept * (t - d), rate, r * self.s_noise)

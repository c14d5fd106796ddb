# SPDX-License-Identifier: Apache-2.0
r"""Flow rules in k-diffusion's convention, where a network returns the clean sample D.

    v = (x - D) / t,    so    A x + B v + tau z = (A + B / t) x - (B / t) D + tau z,

at t = sigma > 0. Without noise of a flow model's own, the sampler is `sample_euler_ancestral_RF` of
k-diffusion and ComfyUI, whose step is LTX's (`steps.ltx`), with the same eta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from msdda_fast.levels import FlowNoise, LevelRange
from msdda_fast.steps.ancestral import read_sigmas
from msdda_fast.steps.flow import FlowGrid, FlowRule, check_flow_sigmas
from msdda_fast.steps.ltx import LTXAncestralRule
from msdda_fast.steps.rules import GridRule, StepTerms
from msdda_fast.steps.schedulers import flow_rule

__all__ = ["DenoisedFlowRule", "denoised_flow_rule"]


@dataclass(frozen=True)
class DenoisedFlowRule(GridRule):
    """The steps of a flow rule, for networks that take sigma and return x_0.

    Attributes:
        velocity: The rule, for networks that return v.
        s_noise: Factor on the noise, no unit; it changes no mean and no share.
    """

    velocity: FlowRule
    s_noise: float = 1.0

    @property
    def grid(self) -> FlowGrid:
        """The T steps."""
        return self.velocity.grid

    @property
    def levels(self) -> LevelRange:
        """Those of the rule."""
        return self.velocity.levels

    @property
    def mixes_unless_told(self) -> bool:
        """As the rule."""
        return self.velocity.mixes_unless_told

    def step(self, level: Tensor) -> StepTerms:
        """Return the Gaussians at `level`, broadcastable to (T, B, M)."""
        return self._of_x0(self.velocity.step(level))

    def step_at(self, rate: Tensor) -> StepTerms:
        """Return the Gaussians of a rate, broadcastable to (T, B, M)."""
        return self._of_x0(self.velocity.step_at(rate))

    def eps_scale(self, level: Tensor) -> Tensor:
        """Return the rule's: at a given x, D is epshat up to a factor of the step."""
        return self.velocity.eps_scale(level)

    def _of_x0(self, terms: StepTerms) -> StepTerms:
        slope = terms.output_scale / self.grid.start
        return terms._replace(
            x_scale=terms.x_scale + slope, output_scale=-slope, unit=self.s_noise * terms.unit
        )


def denoised_flow_rule(
    sigmas: Tensor | Sequence[float], noise: FlowNoise | None = None, s_noise: float = 1.0
) -> DenoisedFlowRule:
    """Return the rule of T steps of a flow model whose networks take sigma and return x_0.

    Args:
        sigmas: (T + 1,) in [0, 1], T >= 1, decreasing; x = (1 - sigma) x_0 + sigma eps.
        noise: What the levels of the objectives have in common; None: Euler ancestral's, eta.
        s_noise: Factor on the noise, no unit, >= 0.

    Raises:
        InvalidSchedule: Sigmas or s_noise outside of the ranges above, or a window of noise that
            ends after the last step.
        InvalidShape: `sigmas` is not (T + 1,).
    """
    values = check_flow_sigmas(read_sigmas(sigmas, s_noise), "flow model")
    grid = FlowGrid(values[:-1], values)
    velocity = LTXAncestralRule(grid) if noise is None else flow_rule(grid, noise)
    return DenoisedFlowRule(velocity, s_noise)

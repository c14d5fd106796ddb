# SPDX-License-Identifier: Apache-2.0
r"""What a sampler is to a fused step: a Gaussian per noise level, affine in state and output.

Every first-order sampler goes from x_t to x_prev by

    p_i(x_prev | x_t) = N(A x_t + B m_i, tau^2),

with m_i the guided output of objective i, and A, B, tau numbers that depend on the step and on the
objective's noise level (DDIM's eta, say). A `Rule` is those numbers. Eq. 7 weighs objectives by
w_i / tau_i^2, of which only ratios count; a rule therefore gives tau_i = c_i u, with rates c_i that
are still defined where u = 0 and no noise is added, as in DDIM's last step.

A sampler is one file here, with one class. `table.rule_table` makes coefficients of any rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from msdda_fast.levels import LevelRange

__all__ = [
    "CleanTerms",
    "GridRule",
    "MixingRule",
    "OneLevelRule",
    "PredictionTerms",
    "Rule",
    "StepTerms",
    "canonical_step",
    "state_step",
]


class PredictionTerms(NamedTuple):
    """What a network's output m says of the clean sample and of the noise in x_t.

        x0hat = x0_x x_t + x0_output m,    epshat = eps_x x_t + eps_output m.

    Attributes:
        x0_x, x0_output, eps_x, eps_output: One number per step, (T,) or (T, 1, 1) float64.
    """

    x0_x: Tensor
    x0_output: Tensor
    eps_x: Tensor
    eps_output: Tensor


class CleanTerms(NamedTuple):
    """The part of a mean that goes through x0hat, taken out of it so that x0hat can be clipped.

        mean = A x_t + B m + scale clamp(x x_t + output m, -clip_range, clip_range).

    Attributes:
        x, output: x0hat of the state and the output, broadcastable to (T, B, M).
        scale: Of the clipped x0hat in the mean, broadcastable to (T, B, M).
    """

    x: Tensor
    output: Tensor
    scale: Tensor


class StepTerms(NamedTuple):
    """The Gaussians of T steps at some levels; float64 on the host, broadcastable to (T, B, M).

    Attributes:
        x_scale: A, no unit.
        output_scale: B, latent units per unit of the output.
        rate: c >= 0, no unit: how the levels' tau compare within a step, also in a step where all
            are 0. It is 0 only at a level without noise, and may depend on the step.
        unit: u >= 0, latent units, the same for all levels, (T, 1, 1). A rule whose tau has no
            common factor takes c = tau and u = 1, and where all tau vanish the limit of their
            ratios and u = 0.
        clean: What A and B leave out when x0hat is clipped; None: it is not.
    """

    x_scale: Tensor
    output_scale: Tensor
    rate: Tensor
    unit: Tensor
    clean: CleanTerms | None = None

    @property
    def std(self) -> Tensor:
        """tau = c u, latent units."""
        return self.rate * self.unit


class Rule(Protocol):
    """A sampler on T steps, in sampling order."""

    @property
    def timesteps(self) -> Tensor:
        """What the networks take beside x_t, (T,): int64, or floating (a sigma, a flow time)."""

    @property
    def clip_range(self) -> float | None:
        """x0hat is clamped to [-clip_range, clip_range], latent units; None: it is not."""

    @property
    def input_scale(self) -> Tensor | None:
        """What the networks take is `input_scale x_t`, (T,), no unit; None: x_t itself."""

    @property
    def levels(self) -> LevelRange:
        """What a noise level means."""

    def step(self, level: Tensor) -> StepTerms:
        """Return the Gaussians of all steps.

        Args:
            level: Levels inside `levels`, float64, broadcastable to (T, B, M): (M,) for those of M
                objectives, (T, B, 1) for one level per step and sample.
        """


@runtime_checkable
class MixingRule(Rule, Protocol):
    """A rule whose step can be taken on a mixture of noise predictions: `fusion="eps"`."""

    @property
    def mixes_unless_told(self) -> bool:
        """Whether "eps" is the fusion of unequal levels for those who do not say which.

        So it is where Eq. 7 takes a fixed part of the noise away in every step, however many steps
        there are.
        """

    def eps_scale(self, level: Tensor) -> Tensor:
        """|dmean / depshat|, broadcastable to (T, B, M), up to a positive factor per step.

        The factor is chosen so that the result is finite, and not 0 for a step of no length.
        """

    def step_at(self, rate: Tensor) -> StepTerms:
        """The Gaussians whose `StepTerms.rate` this is, broadcastable to (T, B, 1)."""


class GridRule:
    """The part of a rule that is the same for every sampler read off a grid, and unclipped."""

    grid: Any  # has timesteps

    @property
    def timesteps(self) -> Tensor:
        """(T,), those of the grid."""
        timesteps: Tensor = self.grid.timesteps
        return timesteps

    @property
    def clip_range(self) -> float | None:
        """Nothing is clipped."""
        return None

    @property
    def input_scale(self) -> Tensor | None:
        """None: the networks take x_t."""
        return None

    @property
    def mixes_unless_told(self) -> bool:
        """No: what Eq. 7 takes away from the noise vanishes with the size of the steps."""
        return False


class OneLevelRule(GridRule, ABC):
    """The part of a rule of which all levels are alike, and which may clip x0hat."""

    @property
    def clip_range(self) -> float | None:
        """That of the grid."""
        clip_range: float | None = self.grid.clip_range
        return clip_range

    @abstractmethod
    def step(self, level: Tensor) -> StepTerms:
        """Return the Gaussians, the same for every level."""

    def eps_scale(self, level: Tensor) -> Tensor:
        """Return 1: all steps are alike."""
        return torch.ones_like(level)

    def step_at(self, rate: Tensor) -> StepTerms:
        """Return the one step there is."""
        return self.step(rate)


def state_step(
    terms: PredictionTerms,
    *,
    kept: Tensor,
    signal: Tensor,
    rate: Tensor,
    unit: Tensor,
    clips: bool,
) -> StepTerms:
    """The Gaussian of mean `kept x_t + signal x0hat` (DDPM and LCM).

    Args:
        terms: What the outputs mean, (T, 1, 1).
        kept, signal: Of the state and of the clean sample, broadcastable to (T, B, M).
        rate, unit: See `StepTerms`.
        clips: Leave x0hat to `StepTerms.clean`.
    """
    if clips:
        clean = CleanTerms(terms.x0_x, terms.x0_output, signal)
        return StepTerms(kept, torch.zeros_like(kept), rate, unit, clean)
    return StepTerms(kept + signal * terms.x0_x, signal * terms.x0_output, rate, unit)


def canonical_step(
    terms: PredictionTerms,
    *,
    signal: Tensor,
    direction: Tensor,
    rate: Tensor,
    unit: Tensor,
    clips: bool,
) -> StepTerms:
    """The Gaussian of mean `alpha_s x0hat + sqrt(sigma_s^2 - tau^2) epshat` (DDIM and its kin).

    Args:
        terms: What the outputs mean, (T, 1, 1).
        signal: alpha_s where the step goes, broadcastable to (T, B, M), as all that follow.
        direction: sqrt(sigma_s^2 - tau^2).
        rate, unit: See `StepTerms`.
        clips: Leave x0hat to `StepTerms.clean`.
    """
    x_scale, output_scale = direction * terms.eps_x, direction * terms.eps_output
    if clips:
        clean = CleanTerms(terms.x0_x, terms.x0_output, signal)
        return StepTerms(x_scale, output_scale, rate, unit, clean)
    x_scale = x_scale + signal * terms.x0_x
    output_scale = output_scale + signal * terms.x0_output
    return StepTerms(x_scale, output_scale, rate, unit)

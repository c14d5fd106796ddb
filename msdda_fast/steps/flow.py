# SPDX-License-Identifier: Apache-2.0
r"""Flow models: their steps from t = sigma to r = sigma_next < t, and DDIM's rule for them.

alpha = 1 - sigma, and the network's output is the velocity v = eps - x_0, so

    x0hat = x - t v,        epshat = x + (1 - t) v.

DDIM's posterior at eta, for alpha = 1 - sigma, is

    u = r sqrt(1 - ((1 - t) r / (t (1 - r)))^2),     tau = eta u,
    mean = (1 - r) x0hat + sqrt(r^2 - tau^2) epshat,

exact at any step size. eta = 0 is Euler's step of the ODE, x + (r - t) v.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import ETA, FlowNoise, LevelRange
from msdda_fast.steps.rules import GridRule, PredictionTerms, StepTerms, canonical_step

if TYPE_CHECKING:
    from msdda_fast.types import Scheduler

__all__ = ["FlowDDIMRule", "FlowGrid", "FlowRule", "check_flow_sigmas", "flow_grid"]


@dataclass(frozen=True, slots=True)
class FlowGrid:
    """What a scheduler says about T steps of a flow model, in sampling order.

    Attributes:
        timesteps: (T,) float64, what the networks take.
        sigmas: (T + 1,) float64 in [0, 1], decreasing.
    """

    timesteps: Tensor
    sigmas: Tensor

    @property
    def start(self) -> Tensor:
        """T, (T, 1, 1)."""
        return self.sigmas[:-1, None, None]

    @property
    def end(self) -> Tensor:
        """R, (T, 1, 1)."""
        return self.sigmas[1:, None, None]

    def step_terms(self) -> PredictionTerms:
        """Return how x_0 and the noise follow from x_t and a velocity, each (T, 1, 1)."""
        t, one = self.start, torch.ones_like(self.start)
        return PredictionTerms(one, -t, one, 1 - t)

    def canonical_step(self, *, direction: Tensor, rate: Tensor, unit: Tensor) -> StepTerms:
        """The Gaussian of mean (1 - r) x0hat + direction epshat."""
        return canonical_step(
            self.step_terms(),
            signal=1 - self.end,
            direction=direction,
            rate=rate,
            unit=unit,
            clips=False,
        )


@dataclass(frozen=True)
class FlowRule(GridRule, ABC):
    """Steps of a flow model: each rule says what its levels are and which Gaussian has a rate.

    Attributes:
        grid: The T steps.
        noise: The window of steps with noise; None: all.
    """

    grid: FlowGrid
    noise: FlowNoise | None = None
    _noisy: Tensor = field(init=False, repr=False)  # (T, 1, 1)

    def __post_init__(self) -> None:
        count = len(self.grid.timesteps)
        noisy = torch.ones(count).double() if self.noise is None else self.noise.noisy_steps(count)
        object.__setattr__(self, "_noisy", noisy[:, None, None])

    @property
    @abstractmethod
    def levels(self) -> LevelRange:
        """What a noise level means."""

    @abstractmethod
    def rate(self, level: Tensor) -> Tensor:
        """The rates of `level`, broadcastable to (T, B, M)."""

    @abstractmethod
    def step_at(self, rate: Tensor) -> StepTerms:
        """Return the Gaussians of a rate, broadcastable to (T, B, M)."""

    def step(self, level: Tensor) -> StepTerms:
        """Return the Gaussians at `level`, broadcastable to (T, B, M)."""
        return self.step_at(self.rate(level * self._noisy))

    def eps_scale(self, level: Tensor) -> Tensor:
        """Return -B: at a given x, the velocity is epshat up to a factor, which may be infinite."""
        return -self.step(level).output_scale


@dataclass(frozen=True)
class FlowDDIMRule(FlowRule):
    """DDIM for flow models; a level is eta, and 0 is Euler's step of the ODE."""

    @property
    def levels(self) -> LevelRange:
        """Eta in [0, 1]."""
        return ETA

    def rate(self, level: Tensor) -> Tensor:
        """Return `level`."""
        return level

    def step_at(self, rate: Tensor) -> StepTerms:
        """Return DDIM's posteriors."""
        t, r = self.grid.start, self.grid.end
        unit = r * (1 - ((1 - t) * r / (t * (1 - r))) ** 2).clamp(min=0).sqrt()
        direction = (r**2 - (rate * unit) ** 2).clamp(min=0).sqrt()
        return self.grid.canonical_step(direction=direction, rate=rate, unit=unit)


def flow_grid(scheduler: Scheduler) -> FlowGrid:
    """Read the steps off a flow-matching scheduler whose timesteps are set.

    Raises:
        InvalidSchedule: Timesteps that are not set, or sigmas that do not decrease within [0, 1].
    """
    name = type(scheduler).__name__
    sigmas = scheduler.sigmas.detach().to("cpu", torch.float64)  # type: ignore[attr-defined]
    timesteps = scheduler.timesteps.detach().to("cpu", torch.float64)
    timesteps = timesteps[: len(sigmas) - 1]  # LTX lists the end of the last step, too
    if len(sigmas) != len(timesteps) + 1 or len(timesteps) == 0:
        raise InvalidSchedule(
            f"{name} has {len(sigmas)} sigmas and {len(timesteps)} timesteps, expected T + 1 and "
            f"T: call its set_timesteps first"
        )
    return FlowGrid(timesteps, check_flow_sigmas(sigmas, name))


def check_flow_sigmas(sigmas: Tensor, name: str) -> Tensor:
    """Return `sigmas`, (T + 1,) with T >= 1; `name` starts the message of an error.

    Raises:
        InvalidSchedule: They do not decrease within [0, 1].
    """
    if not (sigmas[0] <= 1 and sigmas[-1] >= 0 and (sigmas.diff() < 0).all()):  # false for NaN
        raise InvalidSchedule(
            f"{name}: sigmas must decrease within [0, 1], where a flow model has alpha = 1 - sigma;"
            f" they are {[round(sigma, 6) for sigma in sigmas.tolist()]}"
        )
    return sigmas

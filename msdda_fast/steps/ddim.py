# SPDX-License-Identifier: Apache-2.0
r"""The DDIM rule, from a diffusers DDIM scheduler.

With `a = alpha_bar_t`, `p = alpha_bar_prev`, the DDIM posterior of eta is

    v = (1 - p) / (1 - a) * (1 - a / p),        tau = eta sqrt(v),
    mean = sqrt(p) x0hat + sqrt(1 - p - tau^2) epshat.

All tau share the factor sqrt(v), so the rate is eta itself, in every step and also where v = 0.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule
from msdda_fast.integers import as_integer
from msdda_fast.levels import ETA, LevelRange
from msdda_fast.steps.rules import GridRule, PredictionTerms, StepTerms, canonical_step

if TYPE_CHECKING:
    from msdda_fast.types import Scheduler

__all__ = ["DDIMGrid", "DDIMRule", "ddim_grid", "grid_between", "next_grid", "set_to"]

#: Of diffusers; a scheduler of another library is taken at its word.
_KNOWN = ("DDIMScheduler", "DDIMParallelScheduler")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, slots=True)
class DDIMGrid:
    """What a scheduler says about T steps, in sampling order, and nothing of etas.

    Attributes:
        timesteps: (T,) int64, decreasing.
        alpha_bar_t: (T,) float64, in [0, 1).
        alpha_bar_prev: (T,) float64, in (0, 1]: where the step goes.
        prediction_type: What the networks predict.
        clip_range: x_0 predictions are clamped to [-clip_range, clip_range]; None: they are not.
    """

    timesteps: Tensor
    alpha_bar_t: Tensor
    alpha_bar_prev: Tensor
    prediction_type: str
    clip_range: float | None

    @property
    def var(self) -> Tensor:
        """The DDPM posterior variance `v = (1 - p) / (1 - a) (1 - a / p)`, (T,), latent units^2."""
        a, p = self.alpha_bar_t, self.alpha_bar_prev
        return (1 - p) / (1 - a) * (1 - a / p)

    def step_terms(self) -> PredictionTerms:
        """Return `prediction_terms`, each (T, 1, 1)."""
        return PredictionTerms(*(term[:, None, None] for term in self.prediction_terms()))

    def prediction_terms(self) -> PredictionTerms:
        """Return how x_0 and the noise follow from x_t and a model output, each (T,)."""
        signal, noise = self.alpha_bar_t.sqrt(), (1 - self.alpha_bar_t).sqrt()
        zero, one = torch.zeros_like(signal), torch.ones_like(signal)
        if self.prediction_type == "epsilon":
            return PredictionTerms(1 / signal, -noise / signal, zero, one)
        if self.prediction_type == "v_prediction":
            return PredictionTerms(signal, -noise, noise, signal)
        return PredictionTerms(zero, one, 1 / noise, -signal / noise)


@dataclass(frozen=True, slots=True)
class DDIMRule(GridRule):
    """DDIM on a grid; a level is eta, 1 is DDPM and 0 deterministic.

    Attributes:
        grid: The T steps.
    """

    grid: DDIMGrid

    @property
    def clip_range(self) -> float | None:
        """That of the grid."""
        return self.grid.clip_range

    @property
    def levels(self) -> LevelRange:
        """Eta in [0, 1]: beyond, sqrt(1 - p - eta^2 v) need not exist."""
        return ETA

    def step(self, level: Tensor) -> StepTerms:
        """Return the DDIM posteriors at `level`, broadcastable to (T, B, M)."""
        grid, var, prev = self.grid, self.grid.var[:, None, None], self._prev
        return canonical_step(
            grid.step_terms(),
            signal=prev.sqrt(),
            direction=self._direction(level),
            rate=level,
            unit=var.sqrt(),
            clips=grid.clip_range is not None,
        )

    def eps_scale(self, level: Tensor) -> Tensor:
        """Return |sqrt(1 - p - eta^2 v) - sqrt(p (1 - a) / a)| over (p - a) / sqrt(a).

        The first is what a prediction of the noise counts in the mean; it vanishes for a = p, and
        the quotient does not, nor is it infinite for a = 0.
        """
        a, p = self.grid.alpha_bar_t[:, None, None], self._prev
        size = 1 + level**2 * a * (1 - p) / (p * (1 - a))
        return size / (a.sqrt() * self._direction(level) + (p * (1 - a)).sqrt())

    def step_at(self, rate: Tensor) -> StepTerms:
        """Return `step(rate)`: a rate is eta."""
        return self.step(rate)

    @property
    def _prev(self) -> Tensor:
        return self.grid.alpha_bar_prev[:, None, None]

    def _direction(self, level: Tensor) -> Tensor:
        """sqrt(1 - p - eta^2 v), where the radicand is >= 0 for eta <= 1, up to rounding."""
        return (1 - self._prev - level**2 * self.grid.var[:, None, None]).clamp(min=0).sqrt()


def ddim_grid(scheduler: Scheduler, num_steps: int | None) -> DDIMGrid:
    """Read T = `num_steps` steps off `scheduler`, which is copied and not changed.

    Args:
        scheduler: `diffusers.DDIMScheduler`, or anything with its config and `alphas_cumprod`.
        num_steps: T; None: as the scheduler's timesteps are set.

    Raises:
        InvalidSchedule: T outside [1, num_train_timesteps], timesteps beyond the training ones, or
            a setting the affine DDIM kernel cannot express.
    """
    kind = type(scheduler)
    if kind.__module__.startswith("diffusers.") and kind.__name__ not in _KNOWN:
        raise InvalidSchedule(
            f"{kind.__name__} is not a DDIM scheduler; use "
            f"DDIMScheduler.from_config(scheduler.config)"
        )
    scheduler, num_steps = set_to(scheduler, num_steps)
    num_train_steps = int(scheduler.config.num_train_timesteps)
    timesteps = _timesteps(scheduler, num_steps, num_train_steps)
    # diffusers subtracts the stride instead of taking the next timestep; linspace tells them apart
    previous = timesteps - num_train_steps // num_steps
    config, alpha_bar = scheduler.config, _alpha_bar(scheduler)
    final = torch.ones((), dtype=torch.float64) if config.set_alpha_to_one else alpha_bar[0]
    return grid_between(scheduler, timesteps, previous, final)


def next_grid(scheduler: Scheduler, num_steps: int | None, last: int | None) -> DDIMGrid:
    """Read the steps of a scheduler that goes from each timestep to the next in its list.

    Args:
        scheduler, num_steps: As in `ddim_grid`.
        last: Where the last step goes; None: nowhere, -1: to alpha_bar = 1.

    Raises:
        InvalidSchedule: As `ddim_grid`.
    """
    scheduler, num_steps = set_to(scheduler, num_steps)
    timesteps = _timesteps(scheduler, num_steps, int(scheduler.config.num_train_timesteps))
    end = timesteps[-1:] if last is None else timesteps.new_tensor([last])
    one = torch.ones((), dtype=torch.float64)
    return grid_between(scheduler, timesteps, torch.cat([timesteps[1:], end]), one)


def set_to(scheduler: Scheduler, num_steps: int | None) -> tuple[Scheduler, int]:
    """Return a scheduler whose timesteps are set, and T: a copy of `scheduler`, unless T is None.

    Raises:
        InvalidSchedule: T is outside of the training steps, or the scheduler refuses it.
    """
    if num_steps is None:
        if getattr(scheduler, "custom_timesteps", False):
            return scheduler, len(scheduler.timesteps)
        if (set_steps := getattr(scheduler, "num_inference_steps", None)) is None:
            raise InvalidSchedule(
                f"{type(scheduler).__name__} has no timesteps yet: give num_steps, or call its "
                f"set_timesteps first"
            )
        return scheduler, int(set_steps)
    num_train_steps = int(scheduler.config.num_train_timesteps)
    steps = as_integer(num_steps)
    if steps is None or not 1 <= steps <= num_train_steps:
        raise InvalidSchedule(
            f"num_steps is {num_steps!r}, expected 1 to {num_train_steps}, the training steps"
        )
    scheduler = copy.copy(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise InvalidSchedule(
            f"{type(scheduler).__name__} refuses {num_steps} steps ({error}); to set its timesteps "
            f"otherwise, call its set_timesteps and give num_steps=None"
        ) from error
    return scheduler, steps


def grid_between(
    scheduler: Scheduler, timesteps: Tensor, previous: Tensor, final: Tensor
) -> DDIMGrid:
    """Return the grid of steps from `timesteps` to `previous`, both (T,) int64.

    Args:
        scheduler: Gives alpha_bar and the config.
        timesteps, previous: Negative ones of `previous` are the end.
        final: alpha_bar at the end, ().

    Raises:
        InvalidSchedule: A setting the affine kernel cannot express.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if getattr(config, "thresholding", False):
        raise InvalidSchedule(
            f"{name}: thresholding=True rescales x_0 by its own quantile and has no coefficients; "
            f"set thresholding=False (clip_sample works)"
        )
    if (prediction_type := config.prediction_type) not in PREDICTION_TYPES:
        raise InvalidSchedule(
            f"prediction_type is {prediction_type!r}, expected one of {PREDICTION_TYPES}"
        )
    alpha_bar = _alpha_bar(scheduler)
    alpha_bar_t = alpha_bar[timesteps]
    alpha_bar_prev = torch.where(previous >= 0, alpha_bar[previous.clamp(min=0)], final)
    # NaN fails too: one training step with rescale_betas_zero_snr, for one
    in_order = (alpha_bar_t >= 0) & (alpha_bar_t < 1) & (alpha_bar_prev > 0) & (alpha_bar_prev <= 1)
    if not bool((in_order & (alpha_bar_t <= alpha_bar_prev)).all()):
        here, after = alpha_bar_t[0].item(), alpha_bar_prev[0].item()
        raise InvalidSchedule(
            f"{name}: alphas_cumprod must lie in [0, 1) and fall with the timestep, but the first "
            f"step goes from {here:g} to {after:g}; check the betas of the scheduler's config"
        )
    if prediction_type == "epsilon" and (alpha_bar_t == 0).any():
        raise InvalidSchedule(
            "alpha_bar is 0 at the first step (rescale_betas_zero_snr), where an epsilon "
            "prediction says nothing of x_0; use v_prediction or sample"
        )
    clips = getattr(config, "clip_sample", False)
    return DDIMGrid(
        timesteps=timesteps,
        alpha_bar_t=alpha_bar_t,
        alpha_bar_prev=alpha_bar_prev,
        prediction_type=prediction_type,
        clip_range=float(config.clip_sample_range) if clips else None,
    )


def _alpha_bar(scheduler: Scheduler) -> Tensor:
    return scheduler.alphas_cumprod.detach().to("cpu", torch.float64)


def _timesteps(scheduler: Scheduler, num_steps: int, num_train_steps: int) -> Tensor:
    timesteps = scheduler.timesteps.cpu()
    listed = timesteps.tolist()
    if listed and listed[-1] < 0:
        # its arange yields one element too many by rounding, at T = 61 of 1000 for one
        raise InvalidSchedule(
            f"diffusers' {scheduler.config.timestep_spacing!r} spacing ends num_steps={num_steps} "
            f"with a surplus timestep {listed[-1]}, which reads the noisiest entry of the schedule "
            "and spoils the image; use one step more or less, or another timestep_spacing"
        )
    if timesteps.is_floating_point() or len(listed) != num_steps or (timesteps.diff() >= 0).any():
        raise InvalidSchedule(
            f"{type(scheduler).__name__} gives {len(listed)} timesteps ({timesteps.dtype}, "
            f"starting {listed[:4]}) for num_steps={num_steps}; expected T decreasing integers"
        )
    if listed[0] >= num_train_steps:
        raise InvalidSchedule(
            f"the first timestep is {listed[0]}, but the last of the training steps is "
            f"{num_train_steps - 1}: num_steps={num_steps} is too many for "
            f"steps_offset={scheduler.config.steps_offset}"
        )
    return timesteps

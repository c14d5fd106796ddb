# SPDX-License-Identifier: Apache-2.0
r"""The Euler ancestral rule, in k-diffusion's variables x = x_0 + sigma eps.

From s = sigma_t to r = sigma_prev, Euler ancestral of a denoiser D at eta is the kernel

    up = min(r, eta u),   u = r sqrt(1 - r^2 / s^2),   down = sqrt(r^2 - up^2),
    mean = x + (down - s) (x - D) / s = (down / s) x + (1 - down / s) D,
    p(x_prev | x) = N(mean, up^2),

affine in x and D. With sigma^2 = (1 - alpha_bar) / alpha_bar and x = x_vp / sqrt(alpha_bar), u^2
is DDIM's posterior variance v over alpha_bar_prev, and the mean is DDIM's over its root: for
eta <= 1, where min(r, .) never binds, Euler ancestral *is* DDIM at the same eta, and so are their
fusions.

All up share the factor u, so the rates are

    c = up / u = min(eta, s / sqrt(s^2 - r^2)),

which stay defined at r = 0, where c = min(eta, 1). They depend on the step only where some eta > 1
is clipped. A factor on the noise alone, k-diffusion's s_noise, changes no rate and no mean.

diffusers' EulerAncestralDiscreteScheduler is eta = 1 of this, on a network that takes
x / sqrt(sigma^2 + 1) and predicts eps = (x - x_0) / sigma, or v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, minimum

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.levels import LevelRange
from msdda_fast.steps.rules import StepTerms
from msdda_fast.weights import as_host_float64

if TYPE_CHECKING:
    from msdda_fast.types import Scheduler

__all__ = ["AncestralRule", "ancestral_rule", "read_sigmas", "scheduler_ancestral_rule"]


@dataclass(frozen=True, slots=True)
class AncestralRule:
    """Euler ancestral steps; a level is eta.

    Attributes:
        sigmas: (T + 1,) float64, not increasing, latent units.
        s_noise: Factor on the noise, no unit.
        timesteps: (T,) float64, what the networks take.
        prediction_type: What they predict: "sample", a denoised x_0, as in k-diffusion; or
            "epsilon" or "v_prediction" from a scaled input, as in diffusers.
    """

    sigmas: Tensor
    s_noise: float
    timesteps: Tensor
    prediction_type: str = "sample"

    @property
    def clip_range(self) -> None:
        """Nothing is clipped."""

    @property
    def input_scale(self) -> Tensor | None:
        """1 / sqrt(sigma^2 + 1), (T,), in diffusers' convention; None in k-diffusion's."""
        return None if self.prediction_type == "sample" else (self.sigmas[:-1] ** 2 + 1).rsqrt()

    @property
    def levels(self) -> LevelRange:
        """Eta >= 0; from s / sqrt(s^2 - r^2) > 1 on, all are the same."""
        inf = float("inf")
        return LevelRange(name="eta", meaning="Euler ancestral's stochasticity", low=0.0, high=inf)

    @property
    def mixes_unless_told(self) -> bool:
        """No: what Eq. 7 takes away from the noise vanishes with the size of the steps."""
        return False

    def step(self, level: Tensor) -> StepTerms:
        """Return the kernels at `level`, broadcastable to (T, B, M)."""
        up = minimum(self._end, level * self._unit)  # not rate * unit: a clipped down is exactly 0
        return self._step(up, minimum(level, self._shrink.rsqrt()))

    def step_at(self, rate: Tensor) -> StepTerms:
        """Return the kernels of a rate, broadcastable to (T, B, M)."""
        return self._step(minimum(self._end, rate * self._unit), rate)

    def eps_scale(self, level: Tensor) -> Tensor:
        """Return 1 - down / s over 1 - (r / s)^2, which stays finite for a step of no length."""
        ratio = self._end / self._start
        rate = minimum(level, self._shrink.rsqrt())
        kept = (ratio**2 - (rate * ratio) ** 2 * self._shrink).clamp(min=0).sqrt()
        return (1 + (rate * ratio) ** 2) / (1 + kept)

    def _step(self, up: Tensor, rate: Tensor) -> StepTerms:
        start, end = self._start, self._end
        kept = (end**2 - up**2).clamp(min=0).sqrt() / start
        x0_x, x0_output = self._x0()
        x_scale, output_scale = kept + (1 - kept) * x0_x, (1 - kept) * x0_output
        return StepTerms(x_scale, output_scale, rate, self.s_noise * self._unit)

    def _x0(self) -> tuple[Tensor, Tensor]:
        """How x_0 follows from the state and an output."""
        start = self._start
        if self.prediction_type == "sample":
            return torch.zeros_like(start), torch.ones_like(start)
        if self.prediction_type == "epsilon":
            return torch.ones_like(start), -start
        return 1 / (start**2 + 1), -start * (start**2 + 1).rsqrt()

    @property
    def _start(self) -> Tensor:
        return self.sigmas[:-1, None, None]

    @property
    def _end(self) -> Tensor:
        return self.sigmas[1:, None, None]

    @property
    def _shrink(self) -> Tensor:
        return 1 - (self._end / self._start) ** 2

    @property
    def _unit(self) -> Tensor:
        return self._end * self._shrink.sqrt()


def ancestral_rule(sigmas: Tensor | Sequence[float], s_noise: float = 1.0) -> AncestralRule:
    """Return the rule of T Euler ancestral steps of denoisers, which take sigma and return x_0.

    Args:
        sigmas: (T + 1,) noise levels in latent units, T >= 1, not increasing, positive but for the
            last, which may be 0.
        s_noise: Factor on the noise, no unit, >= 0.

    Raises:
        InvalidSchedule: Sigmas or s_noise outside of the ranges above.
        InvalidShape: `sigmas` is not (T + 1,).
    """
    values = read_sigmas(sigmas, s_noise)
    if not (values.isfinite().all() and (values[:-1] > 0).all() and values[-1] >= 0):
        raise InvalidSchedule(
            f"sigmas must be finite, and positive but for a last 0, got {values.tolist()}"
        )
    if (values.diff() > 0).any():
        raise InvalidSchedule(f"sigmas must not increase, got {values.tolist()}")
    return AncestralRule(values, s_noise, values[:-1])


def read_sigmas(sigmas: Tensor | Sequence[float], s_noise: float) -> Tensor:
    """Return k-diffusion's noise levels as float64 on the host, (T + 1,), T >= 1.

    Raises:
        InvalidSchedule: `s_noise`, the factor on the noise, is negative or not finite.
        InvalidShape: `sigmas` is not (T + 1,).
    """
    values = as_host_float64(sigmas, "sigmas")
    if values.ndim != 1 or len(values) < 2:
        raise InvalidShape(f"sigmas have shape {tuple(values.shape)}, expected (T + 1,), T >= 1")
    if not 0 <= s_noise < float("inf"):
        raise InvalidSchedule(f"s_noise must be finite and not negative, got {s_noise!r}")
    return values


def scheduler_ancestral_rule(scheduler: Scheduler) -> AncestralRule:
    """Return the rule of diffusers' EulerAncestralDiscreteScheduler, whose timesteps are set.

    Raises:
        InvalidSchedule: A prediction type that it does not know, or timesteps that are not set.
    """
    kind = scheduler.config.prediction_type
    if kind not in (known := ("epsilon", "v_prediction")):
        raise InvalidSchedule(f"prediction_type is {kind!r}, expected one of {known}")
    timesteps = scheduler.timesteps.detach().to("cpu", torch.float64)
    sigmas = scheduler.sigmas  # type: ignore[attr-defined]
    return replace(ancestral_rule(sigmas), timesteps=timesteps, prediction_type=kind)

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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, minimum

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.steps.rules import LevelRange, StepTerms
from msdda_fast.weights import as_host_float64

__all__ = ["AncestralRule", "ancestral_rule"]


@dataclass(frozen=True, slots=True)
class AncestralRule:
    """Euler ancestral steps of denoisers; a level is eta, and a network output a denoised x_0.

    Attributes:
        sigmas: (T + 1,) float64, not increasing, latent units.
        s_noise: Factor on the noise, no unit.
    """

    sigmas: Tensor
    s_noise: float

    @property
    def timesteps(self) -> Tensor:
        """(T,) float64: sigma_t, which a denoiser takes."""
        return self.sigmas[:-1]

    @property
    def clip_range(self) -> None:
        """Nothing is clipped: the outputs are x_0 already."""

    @property
    def levels(self) -> LevelRange:
        """Eta >= 0; from s / sqrt(s^2 - r^2) > 1 on, all are the same."""
        inf = float("inf")
        return LevelRange(name="eta", meaning="Euler ancestral's stochasticity", low=0.0, high=inf)

    def step(self, level: Tensor) -> StepTerms:
        """Return the kernels at `level`, broadcastable to (T, B, M)."""
        start, end = self.sigmas[:-1, None, None], self.sigmas[1:, None, None]
        shrink = 1 - (end / start) ** 2
        unit = end * shrink.sqrt()
        up = minimum(end, level * unit)  # not rate * unit: a clipped down is exactly 0
        kept = (end**2 - up**2).sqrt() / start
        rate = minimum(level, shrink.rsqrt())
        return StepTerms(kept, 1 - kept, rate, self.s_noise * unit)


def ancestral_rule(sigmas: Tensor | Sequence[float], s_noise: float = 1.0) -> AncestralRule:
    """Return the rule of T Euler ancestral steps.

    Args:
        sigmas: (T + 1,) noise levels in latent units, T >= 1, not increasing, positive but for the
            last, which may be 0.
        s_noise: Factor on the noise, no unit, >= 0.

    Raises:
        InvalidSchedule: Sigmas or s_noise outside of the ranges above.
        InvalidShape: `sigmas` is not (T + 1,).
    """
    values = as_host_float64(sigmas, "sigmas")
    if values.ndim != 1 or len(values) < 2:
        raise InvalidShape(f"sigmas have shape {tuple(values.shape)}, expected (T + 1,), T >= 1")
    if not (values.isfinite().all() and (values[:-1] > 0).all() and values[-1] >= 0):
        raise InvalidSchedule(
            f"sigmas must be finite, and positive but for a last 0, got {values.tolist()}"
        )
    if (values.diff() > 0).any():
        raise InvalidSchedule(f"sigmas must not increase, got {values.tolist()}")
    if not 0 <= s_noise < float("inf"):
        raise InvalidSchedule(f"s_noise must be finite and not negative, got {s_noise!r}")
    return AncestralRule(values, s_noise)

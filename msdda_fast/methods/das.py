# SPDX-License-Identifier: Apache-2.0
r"""DAS: sequential Monte Carlo towards the base distribution tilted by exp(r_w / alpha).

S. Kim et al., "Test-time Alignment of Diffusion Models without Reward Over-optimization", ICLR
2025. Before step k, P particles aim at the base marginal times the twist

    psi_k = exp(lambda_k r_w(decode(x0hat)) / alpha),    lambda_k = min((1 + gamma)^k - 1, 1).

They are proposed along `h = grad_x r_w / alpha`, taken through decoder and network. With sigma the
standard deviation of the step, that proposal is the base kernel with its noise z shifted:

    x_s = mu + sigma (z + c),    c = sigma lambda_{k+1} h,    log p/m = -(<c, z> + |c|^2 / 2),

summed over the dimensions of a latent. Nothing is divided by sigma, which may be 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from msdda_fast.levels import ETA
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import LatentModel
from msdda_fast.methods.particles import best, check_counts, initial_particles, score
from msdda_fast.methods.resampling import effective_size, systematic

__all__ = ["DAS", "Particles", "Reindex"]

#: "all": what belongs to a particle moves with it. "published": h and psi stay, as in the authors'
#: code, where a survivor carries on with those of the particle whose place it took.
Reindex: TypeAlias = Literal["all", "published"]

#: Purpose of the choice among particles.
RESAMPLE = 2


class Particles(NamedTuple):
    """P weighted images of each of B samples.

    Attributes:
        images: (P B, 3, H, W) in [0, 1], particle-major.
        log_weights: (P, B) float64. Their log-mean-exp estimates log E[exp(r_w / alpha)], the
            normaliser of the tilted distribution.
    """

    images: Tensor
    log_weights: Tensor


class _Outlook(NamedTuple):
    """At P B latents: eps (P B, *S), log psi / lambda (P, B) float64, and h (P B, *S)."""

    eps: Tensor
    log_tilt: Tensor
    h: Tensor


@dataclass(frozen=True, kw_only=True)
class DAS(Method):
    """The image with the largest weight of P particles. The defaults are the paper's at T = 100.

    Costs per image P T evaluations of the base and as many backward passes, P (T + 1) decodes and
    P (T + 1) scores. Resampling is systematic; the paper's is SSP.

    Args:
        num_particles: P, at least 1.
        alpha: Strength of the KL term against the reward, in units of r_w, > 0. The paper's is
            0.005 for the aesthetic score and for its sum with CLIP's, 0.01 for CLIP alone.
        gamma: Rate of the tempering, > 0; lambda reaches 1 at k = log 2 / log(1 + gamma), which is
            87 by default. The final images are weighted at lambda = 1, whatever T is.
        eta: In [0, 1].
        threshold: Resample when the effective sample size is below this share of P, in [0, 1].
        gradient_scale: Multiplies h, >= 0; the weights correct for any value. At 0 particles are
            proposed from the base without backward passes, and rewards need no gradient.
        reindex: What follows a particle when it is resampled; see `Reindex`.
        max_rows: Number of latents that are differentiated at a time.

    Raises:
        InvalidSchedule: eta outside its range.
        ValueError: Another field is out of its range; while sampling, a reward is NaN or, with
            gradient_scale > 0, has no gradient.
    """

    name: ClassVar[str] = "DAS"
    needs_rewards: ClassVar[bool] = True
    num_particles: int = 4
    alpha: float = 0.005
    gamma: float = 0.008
    eta: float = 1.0
    threshold: float = 0.5
    gradient_scale: float = 1.0
    reindex: Reindex = "all"
    max_rows: int = 16

    def __post_init__(self) -> None:
        check_counts(self.name, num_particles=self.num_particles, max_rows=self.max_rows)
        ETA.check_one(self.eta, self.name)
        for name, is_valid, accepted in (
            ("alpha", self.alpha > 0, "> 0"),
            ("gamma", 0 < self.gamma < math.inf, "> 0 and finite"),
            ("threshold", 0 <= self.threshold <= 1, "in [0, 1]"),
            ("gradient_scale", 0 <= self.gradient_scale < math.inf, ">= 0 and finite"),
            ("reindex", self.reindex in ("all", "published"), "all or published"),
        ):
            if not is_valid:
                raise ValueError(f"DAS: {name} must be {accepted}, got {getattr(self, name)!r}")

    @property
    def needs_gradients(self) -> bool:
        """Whether particles are proposed along the gradients of the rewards."""
        return self.gradient_scale > 0

    def sample(self, model: LatentModel) -> Tensor:
        """Draw the particles and return the image with the largest weight of each sample."""
        images, log_weights = self.particles(model)
        return best(images, log_weights.flatten(), model.batch_size)

    def particles(self, model: LatentModel) -> Particles:
        """Draw the particles that `sample` chooses from."""
        x = initial_particles(model, self.num_particles)
        log_weights = x.new_zeros((self.num_particles, model.batch_size), dtype=torch.float64)
        log_psi = torch.zeros_like(log_weights)
        for k in range(len(model.grid.timesteps)):
            here = self._look(model, x, k)
            before, log_psi = log_psi, self._temper(k) * here.log_tilt
            log_weights = log_weights + log_psi - before
            x, here, log_psi, log_weights = self._resample(
                x, here, log_psi, log_weights, model.uniform(k, purpose=RESAMPLE)
            )
            step = DDIMStep.of(model.grid, k, self.eta)
            z = model.noise(k, self.num_particles)
            shift = step.std * self._temper(k + 1) * here.h
            x = step.prev(x, here.eps, z + shift)
            log_ratio = -(_dot(shift, z) + _dot(shift, shift) / 2)
            log_weights = log_weights + log_ratio.view_as(log_weights)
        images = model.decode(x)
        log_tilt = (score(model, images).double() / self.alpha).view_as(log_weights)
        return Particles(images, log_weights + log_tilt - log_psi)

    def _temper(self, k: int) -> float:
        """lambda_k; its exponential cannot overflow."""
        return min(math.expm1(min(k * math.log1p(self.gamma), 1.0)), 1.0)

    def _look(self, model: LatentModel, x: Tensor, k: int) -> _Outlook:
        rows = torch.arange(len(x), device=x.device) % model.batch_size
        parts = [
            self._look_at(model, part, k, rows_)
            for part, rows_ in zip(
                torch.split(x, self.max_rows), torch.split(rows, self.max_rows), strict=True
            )
        ]
        eps, log_tilt, h = (torch.cat(part) for part in zip(*parts, strict=True))
        return _Outlook(eps, log_tilt.view(-1, model.batch_size), h)

    def _look_at(self, model: LatentModel, x: Tensor, k: int, rows: Tensor) -> _Outlook:
        """Return the outlook of some latents x (n, *S), with log_tilt (n,)."""
        is_guided = self.gradient_scale > 0
        with torch.set_grad_enabled(is_guided):
            x = x.detach().requires_grad_(is_guided)
            eps = model.eps(x, k, rows=rows)
            images = model.decode(DDIMStep.of(model.grid, k, self.eta).x0(x, eps))
            log_tilt = score(model, images, rows) / self.alpha
            h = torch.zeros_like(x)
            if is_guided:
                (h,) = torch.autograd.grad(self.gradient_scale * log_tilt.sum(), x)
        return _Outlook(eps.detach(), log_tilt.detach().double(), h)

    def _resample(
        self, x: Tensor, here: _Outlook, log_psi: Tensor, log_weights: Tensor, u: Tensor
    ) -> tuple[Tensor, _Outlook, Tensor, Tensor]:
        """Replace the particles of those samples whose weights have become too uneven."""
        count, batch_size = log_weights.shape
        uneven = effective_size(log_weights) < self.threshold * count
        if not uneven.any():
            return x, here, log_psi, log_weights
        own = torch.arange(count, device=x.device)[:, None]
        ancestors = torch.where(uneven, systematic(log_weights, u), own)
        flat = (ancestors * batch_size + torch.arange(batch_size, device=x.device)).flatten()
        mean = log_weights.logsumexp(0) - math.log(count)
        log_weights = torch.where(uneven, mean, log_weights)
        h = here.h
        if self.reindex == "all":
            h, log_psi = h[flat], log_psi.gather(0, ancestors)
        return x[flat], here._replace(eps=here.eps[flat], h=h), log_psi, log_weights


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each row, summed over its dimensions, (n,) float64."""
    return (a.double() * b.double()).flatten(1).sum(1)

# SPDX-License-Identifier: Apache-2.0
r"""TFG, unified training-free guidance: gradients with respect to x_t and to x0hat in one step.

H. Ye et al., "TFG: Unified Training-Free Guidance for Diffusion Models", NeurIPS 2024; code in
github.com/YWolfeee/Training-Free-Guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.guided import GuidedMethod, Purposes, log_mean_exp, renoised, require
from msdda_fast.methods.model import LatentModel, preferred
from msdda_fast.methods.particles import replicate
from msdda_fast.steps.ddim import DDIMGrid

__all__ = ["PRESETS", "TFG"]

Schedule: TypeAlias = Literal["increase", "decrease", "constant"]


@dataclass(frozen=True, kw_only=True)
class TFG(GuidedMethod):
    r"""Guidance by the smoothed target `F(x_0) = log (1/K) sum_k exp f(x_0 + delta_k)`.

    Here `f = r_w / alpha`, one guider per reward with its preference as a factor, and `delta_k` has
    standard deviation `sigma sqrt(1 - a)`. With a = alpha_bar_t and p = alpha_bar_prev, a step is

        Delta_t = rho_t grad_{x_t} F(x0hat(x_t)),              through the UNet,
        n_iter times:  x_0 <- x_0 + mu_t grad_{x_0} F(x_0),    from x0hat; Delta_0 is their sum,
        x_prev = DDIM(x_t, x0hat) + Delta_t / sqrt(a/p) + sqrt(p) Delta_0,

    and n_recur - 1 times x_prev is noised back to x_t = sqrt(a/p) x_prev + sqrt(1 - a/p) z and the
    step repeated. DDIM itself uses the x0hat before the moves.

    `rho_t = rho q_t T / sum_t q_t` over the T steps of the run, with q = a/p ("increase"), 1 - a/p
    ("decrease") or 1 ("constant"); mu_t likewise. The defaults are those of the code. `PRESETS`
    has the methods that TFG contains as special cases.

    Args:
        rho: Mean strength on x_t, 0 or more; with 0 the UNet needs no backward pass.
        mu: Mean strength on x0hat, 0 or more.
        rho_schedule, mu_schedule: q.
        sigma: Smoothing, 0 or more.
        n_samples: K, 1 or more; without smoothing all K are equal.
        n_iter: Moves of x0hat per step, 1 or more.
        n_recur: Passes over a step, 1 or more.
        alpha: Temperature of f, positive. Without smoothing it only scales rho and mu.
        eta: In [0, 1].

    Costs per image n_recur T UNet evaluations, their backward passes if rho is not 0, and
    n_recur T K ([rho != 0] + n_iter [mu != 0]) decodes and evaluations of each reward with their
    gradients, plus the decode of the image.

    Raises:
        ValueError: A setting is out of range.
    """

    name: ClassVar[str] = "TFG"
    rho: float = 1.0
    mu: float = 1.0
    rho_schedule: Schedule = "increase"
    mu_schedule: Schedule = "increase"
    sigma: float = 0.01
    n_samples: int = 4
    n_iter: int = 1
    n_recur: int = 1
    alpha: float = 1.0
    eta: float = 1.0

    def __post_init__(self) -> None:
        for field in ("rho", "mu", "sigma"):
            require(getattr(self, field) >= 0, f"{field} must be 0 or more", getattr(self, field))
        for field in ("n_samples", "n_iter", "n_recur"):
            require(getattr(self, field) >= 1, f"{field} must be 1 or more", getattr(self, field))
        for field in ("rho_schedule", "mu_schedule"):
            value = getattr(self, field)
            require(
                value in get_args(Schedule), f"{field} must be one of {get_args(Schedule)}", value
            )
        require(self.alpha > 0, "alpha must be positive", self.alpha)
        require(0 <= self.eta <= 1, "eta must lie in [0, 1]", self.eta)

    def sample(self, model: LatentModel) -> Tensor:
        """Draw images by guided DDIM steps of the base model."""
        x = model.initial()
        rhos = _strengths(self.rho, self.rho_schedule, model.grid)
        mus = _strengths(self.mu, self.mu_schedule, model.grid)
        for k, (rho, mu) in enumerate(zip(rhos, mus, strict=True)):
            step = DDIMStep.of(model.grid, k, self.eta)
            for passes_left in reversed(range(self.n_recur)):
                draws = Purposes(passes_left)
                target = partial(self._target, model, self._deltas(model, step, k, draws))
                eps, on_x_t = self._prediction_and_gradient(model, step, x, k, target)
                x_prev = step.prev(x, eps, model.noise(k, purpose=draws.step))
                if rho != 0:
                    x_prev += rho * on_x_t / math.sqrt(step.alpha / step.alpha_prev)
                if mu != 0:
                    moved = self._moved(step.x0(x, eps), mu, target)
                    x_prev += math.sqrt(step.alpha_prev) * moved
                if passes_left:
                    x = renoised(step, x_prev, model.noise(k, purpose=draws.renoise))
            x = x_prev
        return model.decode(x)

    def _deltas(self, model: LatentModel, step: DDIMStep, k: int, draws: Purposes) -> Tensor:
        """Return delta_k of one pass, (K B, *S), the same for x_t and x0hat."""
        xi = model.noise(k, self.n_samples, purpose=draws.samples)
        return self.sigma * math.sqrt(1 - step.alpha) * xi

    def _target(self, model: LatentModel, deltas: Tensor, x_0: Tensor) -> Tensor:
        """Return F, (B,), of latents (B, *S)."""
        images = model.decode(replicate(x_0, self.n_samples) + deltas)
        return log_mean_exp(preferred(model, model.rewards(images)) / self.alpha, self.n_samples)

    def _prediction_and_gradient(
        self,
        model: LatentModel,
        step: DDIMStep,
        x: Tensor,
        k: int,
        target: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return eps and grad_{x_t} F, each (B, *S); the gradient is 0 if rho is 0."""
        if self.rho == 0:
            return model.eps(x, k), torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            eps = model.eps(x, k)
            (gradient,) = torch.autograd.grad(target(step.x0(x, eps)).sum(), x)
        return eps.detach(), gradient

    def _moved(self, x0hat: Tensor, mu: float, target: Callable[[Tensor], Tensor]) -> Tensor:
        """Return Delta_0, (B, *S)."""
        x_0 = x0hat
        for _ in range(self.n_iter):
            with torch.enable_grad():
                x_0 = x_0.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(target(x_0).sum(), x_0)
            x_0 = x_0.detach() + mu * gradient
        return x_0 - x0hat


def _strengths(mean: float, schedule: Schedule, grid: DDIMGrid) -> list[float]:
    """Return the strength of each of the T steps; their mean is `mean`."""
    kept = grid.alpha_bar_t / grid.alpha_bar_prev
    q = {"increase": kept, "decrease": 1 - kept, "constant": torch.ones_like(kept)}[schedule]
    strengths: list[float] = (mean * q / q.mean()).tolist()
    return strengths


#: The methods that TFG contains (section 3 of its paper), by what each leaves out. Strengths are
#: TFG's own: set them with `dataclasses.replace(PRESETS["dps"], rho=...)`.
PRESETS: Mapping[str, TFG] = MappingProxyType(
    {
        # H. Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", ICLR
        # 2023: one x0hat, differentiated through the UNet. Dividing by the norm of the residual,
        # as they do, is a reward that is a norm rather than its square.
        "dps": TFG(mu=0.0, sigma=0.0, n_samples=1, rho_schedule="constant"),
        # J. Song et al., "Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation",
        # ICML 2023: DPS smoothed, with std sigma_t / sqrt(1 + sigma_t^2) for sigma_t^2 = (1-a)/a.
        "lgd": TFG(mu=0.0, sigma=1.0, n_samples=10, rho_schedule="constant"),
        # Y. He et al., "Manifold Preserving Guided Diffusion", ICLR 2024, Algorithm 1: x0hat moves,
        # eps stays, and no UNet runs backwards.
        "mpgd": TFG(rho=0.0, sigma=0.0, n_samples=1, mu_schedule="constant"),
        # J. Yu et al., "FreeDoM: Training-Free Energy-Guided Conditional Diffusion Model", ICCV
        # 2023: DPS with every step done again ("time travel"; they do so in the middle steps only).
        "freedom": TFG(mu=0.0, sigma=0.0, n_samples=1, n_recur=2),
        # A. Bansal et al., "Universal Guidance for Diffusion Models", CVPR workshops 2023: forward
        # guidance (rho), m backward steps (n_iter) and k self-recurrences (n_recur), both chosen
        # task by task. They shift the eps that DDIM sees, which weighs both shifts differently
        # over the steps.
        "ugd": TFG(sigma=0.0, n_samples=1, n_iter=4, n_recur=2),
    }
)

# SPDX-License-Identifier: Apache-2.0
r"""MUDM: training-free guidance by several properties, each averaged over samples of x_0.

X. Han et al., "Training-free Multi-objective Diffusion Model for 3D Molecule Generation", ICLR
2024. Their molecules are diffused directly; latents need a decoder on the way to a property.
Chosen here: the spread of the samples, as in J. Song et al. ("Loss-Guided Diffusion Models", ICML
2023), and a step that follows the score of the guided marginal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.guided import GuidedMethod, Purposes, log_mean_exp, renoised, require
from msdda_fast.methods.model import LatentModel, preferred
from msdda_fast.methods.particles import replicate

__all__ = ["MUDM"]

Dependency: TypeAlias = Literal["independent", "dependent"]


@dataclass(frozen=True, kw_only=True)
class MUDM(GuidedMethod):
    r"""Guidance by `log p(y | x_t)`, with p(x_0 | x_t) taken as N(x0hat, r_t^2).

    Property i holds with likelihood `exp(-loss_i)`, loss_i = -r_i / alpha. From the n samples
    `x_0^n = x0hat + r_t xi_n` that all properties share, with r_t = spread sqrt(1 - a),

    - "independent" properties, given x_t, have separate likelihoods,

          ell = sum_i w_i log (1/n) sum_n exp(-loss_i(x_0^n));

    - "dependent" ones are independent given x_0 only, where each has likelihood exp(-w_i loss_i).
      The chain of conditionals weights the samples by the preceding properties,

          ell_{i | <i} = log sum_n softmax_n(-sum_{j<i} w_j loss_j) exp(-w_i loss_i(x_0^n)),

      and its sum is the log of the mean of the product, in any order:

          ell = log (1/n) sum_n exp(-sum_i w_i loss_i(x_0^n)).

    The step is that of the score of `p(x_t) exp(scale ell)`,

        x_prev = DDIM(x_t, eps - scale sqrt(1 - a) grad_{x_t} ell),      through the UNet,

    and n_recur - 1 times x_prev is noised back and the step repeated.

    Args:
        scale: Strength, 0 or more; 1 is that of the target, 0 no guidance.
        alpha: Temperature of the losses, positive.
        n_samples: n, 1 or more.
        spread: Spread of the samples, 0 or more. With 1, r_t is exact for data of unit variance.
        dependency: "independent" or "dependent", as above.
        interval: (lo, hi): steps k with `lo <= k / T < hi` are guided.
        n_recur: Passes over a guided step, 1 or more.
        eta: In [0, 1].

    Costs per image one UNet evaluation with its backward per pass, n decodes and n evaluations of
    each reward with their gradients per guided pass, and the decode of the image.

    Raises:
        ValueError: A setting is out of range.
    """

    name: ClassVar[str] = "MUDM"
    scale: float = 1.0
    alpha: float = 1.0
    n_samples: int = 4
    spread: float = 1.0
    dependency: Dependency = "independent"
    interval: tuple[float, float] = (0.0, 1.0)
    n_recur: int = 1
    eta: float = 1.0

    def __post_init__(self) -> None:
        for field in ("scale", "spread"):
            require(getattr(self, field) >= 0, f"{field} must be 0 or more", getattr(self, field))
        for field in ("n_samples", "n_recur"):
            require(getattr(self, field) >= 1, f"{field} must be 1 or more", getattr(self, field))
        kinds = get_args(Dependency)
        require(self.dependency in kinds, f"dependency must be one of {kinds}", self.dependency)
        low, high = self.interval
        require(
            0 <= low <= high <= 1,
            "interval must be (lo, hi) with 0 <= lo <= hi <= 1",
            self.interval,
        )
        require(self.alpha > 0, "alpha must be positive", self.alpha)
        require(0 <= self.eta <= 1, "eta must lie in [0, 1]", self.eta)

    def sample(self, model: LatentModel) -> Tensor:
        """Draw images by DDIM steps of the base model, guided inside `interval`."""
        x = model.initial()
        num_steps = len(model.grid.timesteps)
        low, high = (bound * num_steps for bound in self.interval)
        for k in range(num_steps):
            step = DDIMStep.of(model.grid, k, self.eta)
            if self.scale == 0 or not low <= k < high:
                x = step.prev(x, model.eps(x, k), model.noise(k))
                continue
            for passes_left in reversed(range(self.n_recur)):
                draws = Purposes(passes_left)
                eps = self._guided_prediction(model, step, x, k, draws)
                x_prev = step.prev(x, eps, model.noise(k, purpose=draws.step))
                if passes_left:
                    x = renoised(step, x_prev, model.noise(k, purpose=draws.renoise))
            x = x_prev
        return model.decode(x)

    def _guided_prediction(
        self, model: LatentModel, step: DDIMStep, x: Tensor, k: int, draws: Purposes
    ) -> Tensor:
        """Return eps - scale sqrt(1 - a) grad ell, (B, *S)."""
        std = math.sqrt(1 - step.alpha)
        xi = model.noise(k, self.n_samples, purpose=draws.samples)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            eps = model.eps(x, k)
            samples = replicate(step.x0(x, eps), self.n_samples) + self.spread * std * xi
            ell = self._log_likelihood(model, model.rewards(model.decode(samples)))
            (gradient,) = torch.autograd.grad(ell.sum(), x)
        return eps.detach() - self.scale * std * gradient

    def _log_likelihood(self, model: LatentModel, rewards: dict[str, Tensor]) -> Tensor:
        """Return ell, (B,), from rewards (n B,) of the samples."""
        if self.dependency == "dependent":
            return log_mean_exp(preferred(model, rewards) / self.alpha, self.n_samples)
        own = {
            name: log_mean_exp(reward / self.alpha, self.n_samples)
            for name, reward in rewards.items()
        }
        return preferred(model, own)

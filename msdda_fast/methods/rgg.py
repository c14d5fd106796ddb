# SPDX-License-Identifier: Apache-2.0
r"""RGG, reward-gradient guidance: every step moves along the gradient of the rewards of x0hat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.guided import GuidedMethod, require
from msdda_fast.methods.model import LatentModel, preferred

__all__ = ["RGG"]

Jacobian: TypeAlias = Literal["detached", "unet"]
Norm: TypeAlias = Literal["pixel", "global", "none"]


@dataclass(frozen=True, kw_only=True)
class RGG(GuidedMethod):
    r"""Reward gradients added to the DDIM step, tempered in over the steps.

    With `r_j` a reward of the decoded `x0hat(x_t)`, step i = 0, 1, ... is

        h = sum_j w_j N(grad_{x_t} r_j / alpha),    lambda_i = min((1 + gamma)^i - 1, 1),
        x_prev = DDIM(x_t) + lambda_i eta^2 v_t h.

    The defaults are those of the scripts released with DB-MPA (github.com/bluewoods127/DB-2025),
    whose results table includes this baseline.

    Args:
        jacobian: "detached" holds eps constant, so that x0hat moves by 1/sqrt(a) per unit of x_t
            and the UNet needs no backward pass; "unet" differentiates it as well.
        norm: N. "pixel" divides by the norm over the channels of each pixel, "global" by that of
            the whole sample, which makes the total sqrt(H W) times smaller; alpha has no effect
            with either. "none" leaves the gradient unchanged. A gradient of 0 stays 0.
        alpha: KL weight, positive.
        gamma: Rate of the tempering, 0 or more; 0 means no guidance.
        eta: In [0, 1]; 0 means no guidance.

    Costs per image T UNet evaluations, T + 1 decodes and J T rewards with their gradients; with
    "unet", T backward passes of the UNet, or J T if each reward is normalised.

    Raises:
        ValueError: A setting is out of range.
    """

    name: ClassVar[str] = "RGG"
    jacobian: Jacobian = "detached"
    norm: Norm = "pixel"
    alpha: float = 0.1
    gamma: float = 0.024
    eta: float = 1.0

    def __post_init__(self) -> None:
        for field, kinds in (("jacobian", get_args(Jacobian)), ("norm", get_args(Norm))):
            value = getattr(self, field)
            require(value in kinds, f"{field} must be one of {kinds}", value)
        require(self.alpha > 0, "alpha must be positive", self.alpha)
        require(self.gamma >= 0, "gamma must be 0 or more", self.gamma)
        require(0 <= self.eta <= 1, "eta must lie in [0, 1]", self.eta)

    def sample(self, model: LatentModel) -> Tensor:
        """Draw images by DDIM steps of the base model, each moved along the reward gradient."""
        x = model.initial()
        for k in range(len(model.grid.timesteps)):
            step = DDIMStep.of(model.grid, k, self.eta)
            temper = min((1 + self.gamma) ** k - 1, 1.0)
            eps, h = self._prediction_and_gradient(model, step, x, k)
            x = step.prev(x, eps, model.noise(k)) + temper * step.std**2 * h
        return model.decode(x)

    def _prediction_and_gradient(
        self, model: LatentModel, step: DDIMStep, x: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Return eps and h, each (B, *S)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            with torch.set_grad_enabled(self.jacobian == "unet"):
                eps = model.eps(x, k)
            rewards = model.rewards(model.decode(step.x0(x, eps)))
            if self.norm == "none":  # linear: one backward pass does for all rewards
                terms = [(1.0, preferred(model, rewards))]
            else:
                terms = [(model.preference[name], value) for name, value in rewards.items()]
            h = torch.zeros_like(x)
            for weight, reward in terms:
                (gradient,) = torch.autograd.grad(reward.sum() / self.alpha, x, retain_graph=True)
                h = h + weight * self._normalised(gradient)
        return eps.detach(), h.detach()

    def _normalised(self, gradient: Tensor) -> Tensor:
        if self.norm == "none":
            return gradient
        axes = (1,) if self.norm == "pixel" else tuple(range(1, gradient.ndim))
        length = torch.linalg.vector_norm(gradient, dim=axes, keepdim=True)
        direction: Tensor = gradient / length.clamp_min(torch.finfo(length.dtype).tiny)
        return direction

# SPDX-License-Identifier: Apache-2.0
"""The Gaussian world as guidance sees it, and toy rewards of images."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.method import Method
from msdda_fast.methods.model import BASE, LatentModel
from tests.gaussian_world import Gaussian, ddim_chain, grid, responses, sd15_scheduler, var_ddpm
from tests.methods.gaussian_model import GaussianModel, sampled

DATA = Gaussian(0.5, 0.25)


class Guided(NamedTuple):
    """What a step of unguided DDIM says about guidance in that step.

    Attributes:
        a, p: alpha_bar before and after.
        var: eta^2 v, the variance of the step.
        jacobian: d x0hat / d x_t with the network in it.
        on_x, on_eps: Coefficients of x_t (network and all) and of eps (alone) in x_prev.
        gain: d x_0 / d x_prev.
    """

    a: float
    p: float
    var: float
    jacobian: float
    on_x: float
    on_eps: float
    gain: float


def guided_steps(eta: float = 1.0, num_steps: int = 50, data: Gaussian = DATA) -> list[Guided]:
    scheduler = sd15_scheduler()
    chain = ddim_chain(data, eta, scheduler, num_steps)
    steps = []
    for (_, a, p), step, (gain, _) in zip(
        grid(scheduler, num_steps), chain, responses(chain), strict=True
    ):
        var = eta**2 * var_ddpm(a, p)
        jacobian = math.sqrt(a) * data.var / (a * data.var + 1 - a)
        on_eps = math.sqrt(1 - p - var) - math.sqrt(p * (1 - a) / a)
        steps.append(Guided(a, p, var, jacobian, step.scale, on_eps, gain))
    return steps


def linear(slope: float):
    """The reward slope x_0."""
    return lambda x_0: slope * x_0


def quadratic(kappa: float, c: float):
    """The reward -kappa/2 (x_0 - c)^2."""
    return lambda x_0: -kappa / 2 * (x_0 - c) ** 2


def world(*rewards, weights=None, **settings) -> GaussianModel:
    """A model with the given rewards, equally preferred unless told."""
    weights = weights or [1 / len(rewards)] * len(rewards)
    names = [f"r{index}" for index in range(len(rewards))]
    return GaussianModel(
        {BASE: DATA},
        preference=dict(zip(names, weights, strict=True)),
        scalar_rewards=dict(zip(names, rewards, strict=True)),
        **settings,
    )


def shift(method: Method, *rewards, **settings) -> float:
    """By how much rewards move x_0 of one sample whose noise stays the same."""
    guided = sampled(method, world(*rewards, **settings))
    unguided = sampled(method, world(*[linear(0.0)] * len(rewards), **settings))
    return float(guided - unguided)


def plain(model: LatentModel, eta: float = 1.0) -> Tensor:
    """The images of unguided DDIM, step by step."""
    with torch.no_grad():
        x = model.initial()
        for k in range(len(model.grid.timesteps)):
            x = DDIMStep.of(model.grid, k, eta).prev(x, model.eps(x, k), model.noise(k))
        return model.decode(x)


class Red:
    name, differentiable = "warm", True

    def __call__(self, images, prompts):
        return (images[:, 0] - images[:, 2]).mean((1, 2)) * 10


class Contrast:
    name, differentiable = "cool", True

    def __call__(self, images, prompts):
        return images.flatten(1).var(1) * 10


TOYS = {"warm": Red(), "cool": Contrast()}

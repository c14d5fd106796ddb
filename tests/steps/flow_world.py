# SPDX-License-Identifier: Apache-2.0
"""Steps of flow models as their papers write them, in plain Python; nothing is from `msdda_fast`.

An output is v = eps - x_0. A step is (A, B, tau): x_prev = A x + B v + tau z.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.gaussian_world import Gaussian, Step

Affine = tuple[float, float, float]


def flow_scheduler(num_steps: int, shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler with its sigmas in float64, so that nothing is rounded on the way."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    plain = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    sigmas = shift * plain / (1 + (shift - 1) * plain)
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    scheduler.timesteps = 1000 * sigmas
    return scheduler


def times(scheduler: object) -> list[tuple[float, float]]:
    """(sigma, sigma_next) of each step."""
    return list(pairwise(scheduler.sigmas.tolist()))


def read_off(mean: Callable[[float, float], float], std: float) -> Affine:
    """A, B and tau of a step whose mean is written in x and v."""
    return mean(1.0, 0.0), mean(0.0, 1.0), std


def flow_grpo(t: float, r: float, level: float, sigma_max: float) -> Affine:
    """flow_grpo/diffusers_patch/sd3_sde_with_logprob.py: `sde_step_with_logprob`."""
    std_dev = math.sqrt(t / (1 - (sigma_max if t == 1 else t))) * level
    dt = r - t

    def mean(x: float, v: float) -> float:
        drift = v * (1 + std_dev**2 * (1 - t) / (2 * t)) * dt
        return x * (1 + std_dev**2 / (2 * t) * dt) + drift

    return read_off(mean, std_dev * math.sqrt(-1 * dt))


def dance(t: float, r: float, eta: float) -> Affine:
    """DanceGRPO's `flux_step`."""
    dsigma, delta_t = r - t, t - r

    def mean(x: float, v: float) -> float:
        x_0 = x - t * v
        score = -(x - x_0 * (1 - t)) / t**2
        return x + dsigma * v + (-0.5 * eta**2 * score) * dsigma

    return read_off(mean, eta * math.sqrt(delta_t))


def cps(t: float, r: float, level: float) -> Affine:
    """Flow-CPS's `sde_step_with_logprob`, sde_type "cps"."""
    std = r * math.sin(level * math.pi / 2)

    def mean(x: float, v: float) -> float:
        x_0, x_1 = x - t * v, x + v * (1 - t)
        return x_0 * (1 - r) + x_1 * math.sqrt(r**2 - std**2)

    return read_off(mean, std)


def flow_ddim(t: float, r: float, eta: float) -> Affine:
    """Formula (16) of the DDIM paper for alpha_bar = (1 - t)^2 / ((1 - t)^2 + t^2), rescaled.

    A flow's state over sqrt((1 - t)^2 + t^2) is that of a variance-preserving process.
    """
    a, p = ((1 - s) ** 2 / ((1 - s) ** 2 + s**2) for s in (t, r))
    size = math.sqrt((1 - r) ** 2 + r**2)
    var = eta**2 * (1 - p) / (1 - a) * (1 - a / p)

    def mean(x: float, v: float) -> float:
        x_0, eps = x - t * v, x + v * (1 - t)
        return size * (math.sqrt(p) * x_0 + math.sqrt(max(1 - p - var, 0)) * eps)

    return read_off(mean, size * math.sqrt(var))


def velocity(data: Gaussian, t: float) -> tuple[float, float]:
    """The ideal velocity of data N(mean, var) at t, slope x + offset."""
    spread = (1 - t) ** 2 * data.var + t**2
    slope = (t - (1 - t) * data.var) / spread
    return slope, -slope * (1 - t) * data.mean - data.mean


def chain(data: Gaussian, scheduler: object, step: Callable[[float, float], Affine]) -> list[Step]:
    """A sampler of the ideal velocity as Gaussian steps of x alone."""
    steps = []
    for t, r in times(scheduler):
        (a, b, tau), (slope, offset) = step(t, r), velocity(data, t)
        steps.append(Step(a + b * slope, b * offset, tau**2))
    return steps

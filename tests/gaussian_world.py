# SPDX-License-Identifier: Apache-2.0
"""A world in which sampling has a closed form.

For data N(m, s2) the ideal noise prediction is affine in x_t, so every sampler of this project is
an affine Gaussian recursion: its steps are x_prev = scale x + shift + sqrt(var) z, and the exact
mean and variance of x_0 follow without a single random number. Plain Python floats (float64),
written from the DDIM paper and Eq. 7 alone: nothing here comes from `msdda_fast`.

An implementation is measured exactly too: it is affine in (x_T, z_0, ..., z_{T-1}), so its answers
to 0 and to each unit impulse give the mean and variance of its x_0 (`measured_moments`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor


class Moments(NamedTuple):
    """Mean and variance of a scalar x_0."""

    mean: float
    var: float


class Step(NamedTuple):
    """x_prev = scale x + shift + sqrt(var) z."""

    scale: float
    shift: float
    var: float


Chain = list[Step]


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, var) and its ideal noise prediction, `slope x + offset` at each alpha_bar."""

    mean: float
    var: float

    def eps_affine(self, alpha_bar: float) -> tuple[float, float]:
        slope = math.sqrt(1 - alpha_bar) / (alpha_bar * self.var + 1 - alpha_bar)
        return slope, -slope * math.sqrt(alpha_bar) * self.mean

    def denoiser(self, scheduler: DDIMScheduler) -> Callable[[Tensor, Tensor], Tensor]:
        """The ideal noise prediction as a network (x_t, t) -> eps."""

        def eps(x_t: Tensor, t: Tensor) -> Tensor:
            slope, offset = self.eps_affine(float(scheduler.alphas_cumprod[t]))
            return slope * x_t + offset

        return eps


def sd15_scheduler(**overrides: object) -> DDIMScheduler:
    """Stable Diffusion 1.5's scheduler, its alpha_bar computed in float64."""
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    scheduler = DDIMScheduler(**(config | overrides))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    to_one = scheduler.config.set_alpha_to_one
    scheduler.final_alpha_cumprod = betas.new_ones(()) if to_one else scheduler.alphas_cumprod[0]
    return scheduler


def grid(scheduler: DDIMScheduler, num_steps: int) -> list[tuple[int, float, float]]:
    """(t, alpha_bar_t, alpha_bar_prev) of each step, in sampling order."""
    scheduler.set_timesteps(num_steps)
    steps = []
    for t in scheduler.timesteps.tolist():
        previous = t - scheduler.config.num_train_timesteps // num_steps
        alpha_bar = scheduler.alphas_cumprod
        after = alpha_bar[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        steps.append((t, float(alpha_bar[t]), float(after)))
    return steps


def var_ddpm(alpha_bar_t: float, alpha_bar_prev: float) -> float:
    """The DDPM posterior variance v_t."""
    return (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)


def ddim_step(eps: tuple[float, float], a: float, b: float, eta: float) -> Step:
    """One DDIM step of a noise prediction `eps = slope x + offset` from alpha_bar a to b."""
    slope, offset = eps
    var = eta**2 * var_ddpm(a, b)
    on_eps = math.sqrt(max(1 - b - var, 0.0)) - math.sqrt(b * (1 - a) / a)
    return Step(math.sqrt(b / a) + on_eps * slope, on_eps * offset, var)


def ddim_chain(data: Gaussian, eta: float, scheduler: DDIMScheduler, num_steps: int = 50) -> Chain:
    return [ddim_step(data.eps_affine(a), a, b, eta) for _, a, b in grid(scheduler, num_steps)]


def fuse_step(steps: Sequence[Step], weights: Sequence[float]) -> Step:
    """Eq. 7 on affine steps; objectives of weight 0 take no part."""
    pairs = [(step, w / step.var) for step, w in zip(steps, weights, strict=True) if w]
    precision = sum(p for _, p in pairs)
    return Step(
        sum(p * step.scale for step, p in pairs) / precision,
        sum(p * step.shift for step, p in pairs) / precision,
        1 / precision,
    )


def fuse_chains(chains: Sequence[Chain], weights: Sequence[float]) -> Chain:
    return [fuse_step(steps, weights) for steps in zip(*chains, strict=True)]


def mixed_eps_chain(
    experts: Sequence[Gaussian],
    mixture: Sequence[float],
    eta: float,
    scheduler: DDIMScheduler,
    num_steps: int = 50,
) -> Chain:
    """DB-MPA: mix the noise predictions, then one DDIM step at a common eta."""
    chain = []
    for _, a, b in grid(scheduler, num_steps):
        lines = [expert.eps_affine(a) for expert in experts]
        mixed = tuple(
            sum(w * line[part] for w, line in zip(mixture, lines, strict=True)) for part in (0, 1)
        )
        chain.append(ddim_step(mixed, a, b, eta))
    return chain


def moments(chain: Chain) -> Moments:
    """Mean and variance of x_0 from x_T ~ N(0, 1)."""
    mean, var = 0.0, 1.0
    for step in chain:
        mean = step.scale * mean + step.shift
        var = step.scale**2 * var + step.var
    return Moments(mean, var)


def responses(chain: Chain) -> list[tuple[float, float]]:
    """(G, h) after each step, with E[x_0 | x after step k] = G x + h."""
    gain, offset, pairs = 1.0, 0.0, []
    for step in reversed(chain):
        pairs.append((gain, offset))
        gain, offset = gain * step.scale, gain * step.shift + offset
    return pairs[::-1]


def aligned_chain(
    base: Chain, rewards: Sequence[tuple[float, float, float]], kl_weight: float
) -> Chain:
    """The exact step-level optimum (Eq. 3) over `base` for sum_j share_j * -k_j/2 (x_0 - c_j)^2.

    `rewards` are (share_j, k_j, c_j). pi* ~ pi_base exp(E_base[r | x_prev] / lambda), and the
    exponent is quadratic in x_prev, so pi* is a Gaussian with its own variance at every step.
    """
    chain = []
    for step, (gain, offset) in zip(base, responses(base), strict=True):
        precision = 1 / step.var
        pull = 0.0
        for share, k, c in rewards:
            precision += share * k * gain**2 / kl_weight
            pull += share * k * gain * (c - offset) / kl_weight
        var = 1 / precision
        chain.append(Step(var * step.scale / step.var, var * (step.shift / step.var + pull), var))
    return chain


def measured_moments(sample: Callable[[Tensor, Tensor], Tensor], num_steps: int = 50) -> Moments:
    """Exact moments of x_0 of an implementation that is affine in its random inputs.

    `sample(x_T (B, 1), noise (T, B, 1)) -> x_0 (B, 1)` runs once, on a batch of impulses: sample 0
    has no input, sample 1 has x_T = 1, sample 2 + k has z_k = 1.
    """
    batch = num_steps + 2
    x_T = torch.zeros(batch, 1, dtype=torch.float64)
    noise = torch.zeros(num_steps, batch, 1, dtype=torch.float64)
    x_T[1] = 1.0
    for k in range(num_steps):
        noise[k, 2 + k] = 1.0
    x_0 = sample(x_T, noise).squeeze(1)
    impulses = x_0[1:] - x_0[0]
    return Moments(float(x_0[0]), float(impulses.square().sum()))

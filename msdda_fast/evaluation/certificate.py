# SPDX-License-Identifier: Apache-2.0
r"""Is an adapter the optimum that Theorem 1 assumes, and of which KL weight?

On a path of the base model, x_{t-1} = mu_pre + sigma_t z_t, an aligned model with the mean
mu_i = mu_pre + Delta_t and the same sigma_t has the log-ratio

    log p_i / p_pre = sum_t [<z_t, Delta_t> / sigma_t - |Delta_t|^2 / (2 sigma_t^2)] = G - K.

The optimum of the paper's Eq. (3) is p_i ~ p_pre exp(V(x_{t-1}) / lambda) in each step, where
V(x) = E_pre[r(x_0) | x]. Where V is linear over one step (in the limit of small steps it is),
Delta_t = sigma_t^2 grad V / lambda. V is a martingale of the base, V(x_t) = V(mu_pre), so

    lambda <z_t, Delta_t> / sigma_t = V(x_{t-1}) - V(x_t),    and summed    lambda G = r - V(x_T).

So rewards are regressed on G alone. The log-ratio G - K would be right for the optimum over whole
paths, whose V is the soft value lambda log E_pre[exp(r / lambda) | x], no martingale: there
V(x_t) = V(mu_pre) + lambda |Delta_t|^2 / (2 sigma_t^2). Both agree where all paths share K.

V(x_T) is the same for all paths from one x_T, so several start from each, and values are taken less
the mean of their start. The slope is then lambda_i, and R^2, the share of the reward's variance
that it explains, is 1 for an exact optimum and about 0 for a network that ignores the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msdda_fast.errors import InvalidSchedule
from msdda_fast.methods.model import BASE, LatentModel

__all__ = ["Certificate", "Estimate", "Paths", "base_paths", "certificate"]

RESAMPLES = 2000
Values = NDArray[np.float64]


class Paths(NamedTuple):
    """Base paths: N from each of B starts, all (N, B) float64."""

    rewards: dict[str, Tensor]  # r(x_0) by name
    gains: dict[str, Tensor]  # G by model, nats
    kl: dict[str, Tensor]  # K by model, nats; its mean is KL(base || model) over the path


class Estimate(NamedTuple):
    """An estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class Certificate(NamedTuple):
    """How far an adapter is the optimum of Eq. (3) for one reward."""

    kl_weight: Estimate  # lambda_i, in units of the reward per nat
    r_squared: Estimate  # in [0, 1]
    kl: float  # KL(base || adapter) over the path, nats


@torch.no_grad()
def base_paths(
    model: LatentModel,
    eta: float,
    names: Sequence[str],
    paths: int,
) -> Paths:
    """Draw `paths` base paths from each x_T of the model, and measure G and K of aligned models.

    Steps without variance are deterministic: they have no log-ratio and are left out.

    Args:
        model: Its preference names the rewards.
        eta: Of the base and of the aligned models, in (0, 1].
        names: Aligned models; one pass of the base serves all of them.
        paths: N >= 2.

    Raises:
        InvalidSchedule: `eta` is 0, or samples are clipped, which leaves steps no Gaussians.
        ValueError: `paths` is below 2.
    """
    if paths < 2:
        raise ValueError(f"a certificate needs at least 2 paths from each start, got {paths}")
    grid = model.grid
    if not 0 < eta <= 1:
        raise InvalidSchedule(f"a certificate needs steps with variance, got eta {eta:g}")
    if grid.clip_range is not None:
        raise InvalidSchedule("clip_sample makes the step non-Gaussian; set clip_sample=False")
    x = model.initial()
    x = x.repeat(paths, *[1] * (x.dim() - 1))
    gains = {name: torch.zeros(len(x), dtype=torch.float64) for name in names}
    kl = {name: torch.zeros(len(x), dtype=torch.float64) for name in names}
    for k in range(len(grid.timesteps)):
        a, p = float(grid.alpha_bar_t[k]), float(grid.alpha_bar_prev[k])
        sigma = eta * float(grid.var[k]) ** 0.5
        on_eps = max(1 - p - sigma**2, 0.0) ** 0.5 - (p * (1 - a) / a) ** 0.5
        eps, z = model.eps(x, k), model.noise(k, paths)
        for name in names if sigma > 0 else ():
            if model.acting(name, k) == BASE:  # no shift
                continue
            shift = (on_eps / sigma * (model.eps(x, k, name) - eps)).flatten(1).double()
            gains[name] += (z.flatten(1).double() * shift).sum(1).cpu()
            kl[name] += shift.square().sum(1).cpu() / 2
        x = (p / a) ** 0.5 * x + on_eps * eps + sigma * z
    rewards = model.rewards(model.decode(x))

    def by_path(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: column.double().cpu().view(paths, -1) for name, column in columns.items()}

    return Paths(by_path(rewards), by_path(gains), by_path(kl))


def certificate(rewards: Values, gains: Values, kl: Values) -> Certificate:
    """Regress rewards on G, with intervals from resampled prompts and starts within prompts.

    Args:
        rewards, gains, kl: r, G and K, (P, S, N): N paths from each of S starts of P prompts.
    """
    y, g = (values - values.mean(2, keepdims=True) for values in (rewards, gains))
    moments = np.stack([(y * g).sum(2), (g * g).sum(2), (y * y).sum(2)])  # (3, P, S)
    rng, (prompts, starts) = np.random.default_rng(0), moments.shape[1:]
    p = rng.integers(prompts, size=(RESAMPLES, prompts, 1))
    s = rng.integers(starts, size=(RESAMPLES, prompts, starts))
    resampled = moments[:, p, s].sum((2, 3))
    slopes, shares = _fit(resampled)
    slope, share = _fit(moments.sum((1, 2)))
    return Certificate(_estimate(slope, slopes), _estimate(share, shares), float(kl.mean()))


def _fit(moments: Values) -> tuple[Values, Values]:
    """Return slope and R^2 from (3, ...) sums of y g, g g and y y; 0 where g does not vary."""
    yg, gg, yy = moments
    slope = np.divide(yg, gg, out=np.zeros_like(yg), where=gg > 0)
    share = np.divide(yg * slope, yy, out=np.zeros_like(yg), where=yy > 0)
    return slope, share


def _estimate(value: Values, resamples: Values) -> Estimate:
    low, high = np.quantile(resamples, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))

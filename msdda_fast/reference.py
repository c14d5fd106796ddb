# SPDX-License-Identifier: Apache-2.0
"""The paper, line by line: the judge of every fast path, imported by tests and benchmarks alone.

Written from Algorithm 1 and the DDIM paper, not from `schedule.py`. Computes in the dtype of its
inputs; judge in float64. Zero variance raises: Eq. 7 divides by it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msdda_fast.errors import ZeroVariance

__all__ = ["algorithm_1", "ddim_posterior", "fuse_posteriors", "guide"]

#: p_i(x_{t-1} | x_t): the latent x_t (B, *S) and the step k to (mu_i (B, *S), sigma_i^2).
Posterior = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def guide(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, `u + g (c - u)`; all of shape (B, *S)."""
    return uncond + guidance_scale * (cond - uncond)


def ddim_posterior(
    x_t: Tensor,
    output: Tensor,
    alpha_bar_t: float,
    alpha_bar_prev: float,
    eta: float,
    prediction_type: str = "epsilon",
    clip_range: float | None = None,
) -> tuple[Tensor, Tensor]:
    """DDIM Eq. 12 and 16: the Gaussian `p(x_prev | x_t)` that a (guided) model output stands for.

    sigma^2 = eta^2 (1 - alpha_bar_prev) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_prev),
    mu = sqrt(alpha_bar_prev) x0hat + sqrt(1 - alpha_bar_prev - sigma^2) eps.

    Args:
        x_t, output: (B, *S), latent units.
        alpha_bar_t, alpha_bar_prev: Where the step starts and ends, in (0, 1].
        eta: Stochasticity, in [0, 1].
        prediction_type: What `output` is: "epsilon", "v_prediction" or "sample".
        clip_range: Clamp x0hat to [-clip_range, clip_range] and leave eps, as diffusers does.

    Returns:
        mu (B, *S) and sigma^2 (), latent units and their square.
    """
    a = torch.as_tensor(alpha_bar_t, dtype=x_t.dtype)
    b = torch.as_tensor(alpha_bar_prev, dtype=x_t.dtype)
    if prediction_type == "epsilon":
        eps = output
        x0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
    elif prediction_type == "v_prediction":
        eps = a.sqrt() * output + (1 - a).sqrt() * x_t
        x0 = a.sqrt() * x_t - (1 - a).sqrt() * output
    elif prediction_type == "sample":
        x0 = output
        eps = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
    else:
        raise ValueError(f"prediction_type {prediction_type!r}")
    if clip_range is not None:
        x0 = x0.clamp(-clip_range, clip_range)
    var = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
    return b.sqrt() * x0 + (1 - b - var).clamp(min=0).sqrt() * eps, var


def fuse_posteriors(means: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7, `sigma_w^-2 = sum_i w_i / sigma_i^2`, `mu_w = sigma_w^2 sum_i w_i / sigma_i^2 mu_i`.

    Args:
        means: (M, B, *S), latent units.
        variances: > 0, latent units squared; (M,), (M, B) or (M, B, *S).
        weights: (M,), (M, B) or (M, B, *S), sum 1 over the first axis, no unit.

    Returns:
        mu_w (B, *S) and sigma_w^2, which broadcasts to it.

    Raises:
        ZeroVariance: Some variance is zero, or the total precision is not positive.
    """
    if (variances <= 0).any():
        raise ZeroVariance(f"Eq. 7 divides by the variances {variances}; they must be positive")
    precision = _from_left(weights, means.ndim) / _from_left(variances, means.ndim)
    total = precision.sum(dim=0)
    if (total <= 0).any():
        raise ZeroVariance(f"the total precision {total} must be positive")
    return (precision * means).sum(dim=0) / total, 1 / total


def algorithm_1(
    posteriors: Sequence[Posterior], weights: Tensor, x_T: Tensor, noise: Tensor
) -> Tensor:
    """Algorithm 1: sample x_0 from M aligned models and preference weights.

    Args:
        posteriors: Step k = 0..T-1, in sampling order, of each p_i.
        weights: (M,) or (M, B), sum 1 over the first axis.
        x_T: (B, *S), standard normal (line 1).
        noise: (T, B, *S), the z of line 10; its length is T.

    Returns:
        x_0, (B, *S).
    """
    x = x_T
    for k, z in enumerate(noise):
        moments = [posterior(x, k) for posterior in posteriors]
        means = torch.stack([mean for mean, _ in moments])
        variances = torch.stack([torch.as_tensor(var) for _, var in moments])
        mean_w, var_w = fuse_posteriors(means, variances, weights)
        x = mean_w + var_w.sqrt() * z
    return x


def _from_left(values: Tensor, ndim: int) -> Tensor:
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))

# SPDX-License-Identifier: Apache-2.0
r"""DPOK's policy loss (Fan et al., "DPOK", NeurIPS 2023), which aligned the paper's models.

One transition (x_t, x_{t-1}) of a trajectory with reward r has the loss

    -w_r (r - V(x_t)) clamp(exp(log p_theta - log p_old), 1 - c, 1 + c)  +  w_kl KL,

where log p is the *mean* over the latent dimensions: the sum of 16384 terms would leave 1 +- 1e-4
at once. Unlike in PPO, there is no minimum around the clamp: outside it the gradient is zero,
whatever the sign of the advantage. The KL term has two forms:

    "eps"     mean ||eps_theta - eps_pre||^2, as published: not a KL, but proportional to it per t;
    "exact"   KL(p_theta || p_pre) = ||mu_theta - mu_pre||^2 / (2 sigma^2), in nats.

For d dimensions the ratio's gradient is 1/d of that of log p, so with "exact" the lambda of Eq. 2
is w_kl d / w_r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.training.policy import Moments


class DPOKLoss(NamedTuple):
    """The loss of n transitions and the quantities to monitor."""

    loss: Tensor  # (), policy + w_kl kl
    policy: Tensor  # (), mean of -w_r advantage ratio
    kl: Tensor  # (), mean of the KL term, not weighted
    ratio: Tensor  # (n,), p_theta / p_old per dimension (geometric mean), before the clamp
    clip_fraction: Tensor  # (), share of transitions outside the clamp: without gradient


def dpok_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    kl: Tensor,
    *,
    reward_weight: float,
    kl_weight: float,
    clip: float,
) -> DPOKLoss:
    """Return the loss of n transitions, as in the module docstring.

    Args:
        log_prob: Log-probabilities of the policy in training, mean over dimensions, (n,) float32
            or wider: half precision has steps of 1e-3, while the clamp is at 1e-4.
        old_log_prob: Those of the policy that took the step, (n,); no gradient.
        advantage: r - V, (n,), in the reward's units; no gradient.
        kl: The KL term, (n,), see `kl_term`.
        reward_weight: w_r > 0.
        kl_weight: w_kl >= 0.
        clip: c > 0.

    Raises:
        InvalidShape: The four tensors differ in shape.
        ValueError: A log-probability is narrower than float32.
    """
    shapes = [tuple(t.shape) for t in (log_prob, old_log_prob, advantage, kl)]
    if log_prob.dim() != 1 or len(set(shapes)) > 1:
        raise InvalidShape(
            f"log_prob, old_log_prob, advantage and kl must share a shape (n,), got {shapes}"
        )
    for name, value in (("log_prob", log_prob), ("old_log_prob", old_log_prob)):
        if torch.finfo(value.dtype).eps > torch.finfo(torch.float32).eps:
            raise ValueError(f"{name} is {value.dtype}, too coarse for the clip; use float32")
    ratio = (log_prob - old_log_prob).exp()
    clamped = ratio.clamp(1 - clip, 1 + clip)
    policy = (-reward_weight * advantage * clamped).mean()
    return DPOKLoss(
        loss=policy + kl_weight * kl.mean(),
        policy=policy,
        kl=kl.mean(),
        ratio=ratio,
        clip_fraction=((ratio - 1).abs() > clip).to(ratio.dtype).mean(),
    )


def kl_term(theta: Moments, pre: Moments, kind: str) -> Tensor:
    """Return the KL term per transition, (n,), float32.

    Args:
        theta, pre: Moments of the model in training and of the frozen base at the same x_t, with
            equal std.
        kind: "eps" or "exact", as in the module docstring.

    Raises:
        ValueError: `kind` is unknown.
    """
    if kind == "eps":
        return (theta.eps - pre.eps).square().flatten(1).mean(1)
    if kind == "exact":
        return (theta.mean - pre.mean).square().flatten(1).sum(1) / (2 * theta.std.square())
    raise ValueError(f"kl must be eps or exact, got {kind!r}")

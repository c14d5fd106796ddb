# SPDX-License-Identifier: Apache-2.0
r"""Step-level DPO, Lemma 1 and Eq. 4 of the paper, in its linear form.

For a noised sample with known noise eps, let

    a = eps_pre - eps            (error of the frozen base model)
    b = eps_theta - eps_pre      (drift of the model in training)

Eq. 4 compares, between the chosen and the rejected sample, the change of the squared error,
||eps - eps_theta||^2 - ||eps - eps_pre||^2 = 2<a, b> + ||b||^2 (`error_gap`), less the drift
||b||^2 (`drift_gap`). With the drift counted gamma times, the logit of one pair is

    L = -c [ (2<a,b> + (1-gamma) ||b||^2)_chosen - (2<a,b> + (1-gamma) ||b||^2)_rejected ]

and the loss is softplus(-L). gamma = 1 is the paper: the inner product alone, computed directly,
never as the difference of three nearly equal norms. gamma = 0 is Diffusion-DPO.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from msdda_fast.errors import InvalidShape

PREDICTION_TYPES = ("epsilon", "v_prediction")


class StepDPOLoss(NamedTuple):
    """The loss of n pairs and the quantities to monitor; sums are over latent dimensions."""

    loss: Tensor  # (), mean over pairs of softplus(-logits)
    logits: Tensor  # (n,), L above
    accuracy: Tensor  # (), share of pairs with a positive logit, in [0, 1]
    error_gap: Tensor  # (n,), Delta_theta of Eq. 4
    drift_gap: Tensor  # (n,), Delta_diff of Eq. 4
    drift_chosen: Tensor  # (n,), ||b||^2 of the chosen samples
    drift_rejected: Tensor  # (n,), ||b||^2 of the rejected samples


def step_dpo_loss(
    eps_theta_chosen: Tensor,
    eps_pre_chosen: Tensor,
    eps_chosen: Tensor,
    eps_theta_rejected: Tensor,
    eps_pre_rejected: Tensor,
    eps_rejected: Tensor,
    *,
    coefficient: float | Tensor,
    gamma: float = 1.0,
) -> StepDPOLoss:
    r"""Return Eq. 4 for n preference pairs: mean of `softplus(-L)`, L as in the module docstring.

    Args:
        eps_theta_chosen, eps_theta_rejected: Noise predicted by the model in training, (n, *S).
        eps_pre_chosen, eps_pre_rejected: Noise predicted by the frozen base model, (n, *S).
        eps_chosen, eps_rejected: Noise that was added, (n, *S); the same tensor if shared.
        coefficient: c >= 0 per unit of summed squared noise, a number or (n,);
            `dpo_coefficient` gives it in the convention of Diffusion-DPO.
        gamma: Share of the drift taken out of the error, in [0, 1]: 1 the paper, 0 Diffusion-DPO.

    Returns: `StepDPOLoss`, computed in float32 or in the inputs' dtype if that is wider.

    Raises:
        InvalidShape: The six tensors differ in shape, or `coefficient` is neither () nor (n,).
        ValueError: gamma is outside [0, 1], or a coefficient given as a number is negative or NaN.
    """
    predictions = (
        eps_theta_chosen,
        eps_pre_chosen,
        eps_chosen,
        eps_theta_rejected,
        eps_pre_rejected,
        eps_rejected,
    )
    shapes = [tuple(tensor.shape) for tensor in predictions]
    if len(set(shapes)) != 1 or len(shapes[0]) < 2:
        raise InvalidShape(f"the six noise tensors must share one shape (n, *S), got {shapes}")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must be in [0, 1] (1 the paper, 0 Diffusion-DPO), got {gamma}")
    if isinstance(coefficient, Tensor):
        if coefficient.dim() > 0 and tuple(coefficient.shape) != shapes[0][:1]:
            raise InvalidShape(
                f"coefficient must be a number or have shape {shapes[0][:1]}, "
                f"got {tuple(coefficient.shape)}"
            )
    elif not coefficient >= 0.0:
        raise ValueError(f"coefficient must be >= 0, got {coefficient}")

    inner_chosen, drift_chosen = _inner_and_drift(eps_theta_chosen, eps_pre_chosen, eps_chosen)
    inner_rejected, drift_rejected = _inner_and_drift(
        eps_theta_rejected, eps_pre_rejected, eps_rejected
    )
    inner_gap = inner_chosen - inner_rejected
    drift_gap = drift_chosen - drift_rejected
    logits = -coefficient * (inner_gap + (1.0 - gamma) * drift_gap)
    return StepDPOLoss(
        loss=functional.softplus(-logits).mean(),
        logits=logits,
        accuracy=(logits > 0).to(logits.dtype).mean(),
        error_gap=inner_gap + drift_gap,
        drift_gap=drift_gap,
        drift_chosen=drift_chosen,
        drift_rejected=drift_rejected,
    )


def _inner_and_drift(eps_theta: Tensor, eps_pre: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2<a, b> and ||b||^2 per sample, (n,), in float32 or wider."""
    wide = torch.promote_types(eps_theta.dtype, torch.float32)
    base = eps_pre.to(wide).flatten(1)
    error = base - eps.to(wide).flatten(1)
    drift = eps_theta.to(wide).flatten(1) - base
    return 2.0 * torch.linalg.vecdot(error, drift), torch.linalg.vecdot(drift, drift)


def dpo_coefficient(beta_dpo: float, dimensions: int) -> float:
    """Return c = beta_dpo / (2 d): Diffusion-DPO has means over d latent dimensions, Eq. 4 sums.

    Raises:
        ValueError: beta_dpo is not positive, or dimensions is below 1.
    """
    if not beta_dpo > 0.0 or dimensions < 1:
        raise ValueError(f"need beta_dpo > 0 and dimensions >= 1, got {beta_dpo}, {dimensions}")
    return beta_dpo / (2.0 * dimensions)


def snr_weight(alpha_bar_t: Tensor, alpha_bar_prev: Tensor, eta: float = 1.0) -> Tensor:
    r"""Return the exact weight omega_t = B_t^2 / (2 sigma_t^2) of Eq. 4, shaped as the inputs.

    mu = A_t x_t + B_t eps is the DDIM posterior mean and sigma_t^2 = eta^2 v_t its variance; at
    eta = 1 the weight equals (SNR_prev / SNR_t - 1) / 2.

    Args:
        alpha_bar_t, alpha_bar_prev: Noise levels before and after the step,
            0 < alpha_bar_t < alpha_bar_prev < 1; float64 is recommended.
        eta: DDIM stochasticity in (0, 1].

    Raises:
        ValueError: eta is outside (0, 1], or a step has no variance (the policy is deterministic,
            and DPO is not defined).
    """
    if not 0.0 < eta <= 1.0:
        raise ValueError(f"eta must be in (0, 1], got {eta}: without noise DPO is not defined")
    a, b = alpha_bar_t, alpha_bar_prev
    if not bool(((a > 0) & (a < b) & (b < 1)).all()):
        raise ValueError("need 0 < alpha_bar_t < alpha_bar_prev < 1: other steps have no variance")
    var = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
    eps_scale = (1 - b - var).sqrt() - (b * (1 - a) / a).sqrt()
    return eps_scale.square() / (2 * var)


def to_epsilon(
    prediction: Tensor, x_t: Tensor, alpha_bar_t: Tensor, prediction_type: str
) -> Tensor:
    """Return the noise that a network predicts: its output, or sqrt(a) v + sqrt(1-a) x_t for v.

    Args:
        prediction, x_t: (n, *S).
        alpha_bar_t: (n,) or broadcastable to `x_t`.
        prediction_type: "epsilon" or "v_prediction", as in the scheduler's config.

    Raises:
        ValueError: `prediction_type` is unknown.
    """
    if prediction_type == "epsilon":
        return prediction
    if prediction_type != "v_prediction":
        raise ValueError(
            f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}"
        )
    a = alpha_bar_t.reshape(-1, *[1] * (x_t.dim() - 1))
    return a.sqrt() * prediction + (1 - a).sqrt() * x_t

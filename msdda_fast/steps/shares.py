# SPDX-License-Identifier: Apache-2.0
r"""How much each objective counts in a fused step, and what that comes to for T -> infinity.

With preferences w and DDIM posteriors of variance eta_i^2 v_t, Eq. 7 weighs means by

    share_i = (w_i / eta_i^2) / P,        P = sum_j w_j / eta_j^2,        eta_w = P^(-1/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape, InvalidWeights, ZeroVariance
from msdda_fast.objective import check_eta
from msdda_fast.steps.ddim import DDIMGrid
from msdda_fast.weights import as_host_float64, normalise_weights

if TYPE_CHECKING:
    from msdda_fast.types import ZeroVariancePolicy

__all__ = ["effective_weights", "eps_mixture", "fusion_shares"]


def fusion_shares(
    weights: Tensor,
    etas: Tensor,
    *,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `share_i = (w_i / eta_i^2) / sum_j w_j / eta_j^2` and `eta_w`, with their limits.

    Objectives of weight 0 are dropped first. When every remaining eta is 0 the shares are the
    weights, the limit of equal etas. When some are 0 and some are not, the product of experts has
    no limit that all paths share, and `zero_variance` decides; the step is then deterministic:

    - "error": raise `ZeroVariance`;
    - "dominate": the literal limit, objectives with eta = 0 decide, `share_i ~ w_i` among them;
    - "ratio": likewise, vanishing at the given relative rates, `share_i ~ w_i / c_i^2` among them
      (also when every eta is 0).

    Args:
        weights: (..., M) float64 on the host, sum 1 over M; negative entries extrapolate.
        etas: (M,) float64 on the host, in [0, 1].
        zero_variance: The policy.
        rates: (M,) > 0, with "ratio" and only then.

    Returns:
        `share` (..., M), sum 1 over M, and `eta_w` (...), both without unit.

    Raises:
        ZeroVariance: Under "error", a row mixes eta = 0 and eta > 0.
        InvalidWeights: A row leaves no positive total precision.
        InvalidSchedule: An unknown policy, or rates that are missing, not positive or unused.
        InvalidShape: `rates` is not (M,).
    """
    limit_rates = _limit_rates(zero_variance, rates, etas)
    active = weights != 0
    zero = active & (etas == 0)
    degenerate = zero.any(-1, keepdim=True)
    if zero_variance == "error" and (mixed := degenerate & (zero != active)).any():
        row = weights[mixed.any(-1)][0].tolist()
        raise ZeroVariance(
            f"etas {etas.tolist()} with weights {row} mix zero and positive variance, which has no "
            f"unique limit; use etas all 0 or all positive, or zero_variance='dominate' (those "
            f"with eta = 0 decide) or 'ratio' (likewise, with shares w_i / rates_i^2)"
        )
    deciding = torch.where(degenerate, zero, active)
    spread = torch.where(degenerate, limit_rates, etas)
    # relative precisions (s_min / s_i)^2 <= 1: no overflow at any eta, and exact in the limit
    smallest = spread.masked_fill(~deciding, torch.inf).amin(-1, keepdim=True)
    precision = torch.where(deciding, weights * (smallest / spread) ** 2, 0.0)
    total = precision.sum(-1, keepdim=True)
    if not (total > 0).all():
        index = (~(total > 0)).any(-1).nonzero()[0].tolist()
        raise InvalidWeights(
            f"weights {weights[tuple(index)].tolist()} with etas {etas.tolist()} leave the total "
            f"precision sum w_i / eta_i^2 at or below 0; it must be positive"
        )
    eta_w = torch.where(degenerate, 0.0, smallest / total.sqrt())
    return precision / total, eta_w.squeeze(-1)


def effective_weights(
    weights: Tensor | Sequence[Any], etas: Tensor | Sequence[float], *, extrapolate: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the weights and the eta at which DB-MPA comes to the same as MSDDA for T -> infinity.

    The kernel of eta discretises `dx = (f x - (1 + eta^2)/2 g^2 score) dt + eta g dW`. Fused ones
    have the noise eta_w g and the drift of the averaged score with

        what_i = share_i (1 + eta_i^2) / (1 + eta_w^2) = w_i (1 + eta_i^-2) / (1 + P),

    so MSDDA over unequal etas is DB-MPA at eta_w with what in place of w, up to O(1/T): an
    objective of low eta counts more than its weight says. For etas (.8, 1) the weights .2/.5/.8 of
    the first act as .243/.562/.837.

    Args:
        weights: Preferences w (..., M), sum 1 over M.
        etas: (M,), in [0, 1]; all 0 gives w itself.
        extrapolate: Accept negative weights while P stays positive; eta_w may then exceed 1.

    Returns:
        `what` (..., M), sum 1 over M, and `eta_w` (...); float64 on the host, without unit.

    Raises:
        InvalidWeights: Weights off the simplex, or P <= 0.
        InvalidSchedule: An eta outside [0, 1].
        InvalidShape: `etas` is not (M,).
        ZeroVariance: A row mixes eta = 0 and eta > 0.
    """
    values, eta = as_host_float64(weights, "weights"), as_host_float64(etas, "etas")
    if eta.ndim != 1 or values.shape[-1:] != eta.shape:
        raise InvalidShape(
            f"weights and etas have shapes {tuple(values.shape)} and {tuple(eta.shape)}, expected "
            f"(..., M) and (M,)"
        )
    for index, value in enumerate(eta.tolist()):
        check_eta(value, f"objective {index}")
    share, eta_w = fusion_shares(normalise_weights(values, axis=-1, extrapolate=extrapolate), eta)
    return share * (1 + eta**2) / (1 + eta_w[..., None] ** 2), eta_w


def eps_mixture(grid: DDIMGrid, share: Tensor, etas: Tensor, eta_w: Tensor) -> Tensor:
    """Return `what_i = share_i B(eta_i) / sum_j share_j B(eta_j)`, (T, B, M) with sum 1 over M.

    B(eta) = sqrt(1 - p - eta^2 v) - sqrt(p (1 - a) / a) is the coefficient of a noise prediction in
    the DDIM mean. It tends to 0 for small steps, and `what` to `effective_weights`.

    Args:
        grid: T steps from alpha_bar a to p.
        share: (T, B, M) from `fusion_shares`.
        etas: (M,).
        eta_w: (T, B) from `fusion_shares`.

    Raises:
        InvalidWeights: eta_w > 1, for which there is no DDIM step, or predictions that cancel; both
            need negative weights.
    """
    a, p = grid.alpha_bar_t[:, None, None], grid.alpha_bar_prev[:, None, None]
    direction = (1 - p - etas**2 * grid.var[:, None, None]).clamp(min=0).sqrt()
    # |B| over (p - a) / sqrt(a): finite for a = 0, and not 0 for p = a
    size = 1 + etas**2 * a * (1 - p) / (p * (1 - a))
    mixed = share * size / (a.sqrt() * direction + (p * (1 - a)).sqrt())
    total = mixed.sum(-1, keepdim=True)
    if (eta_w > 1 + 1e-9).any() or not (total > 0).all():
        raise InvalidWeights(
            f"fusion='eps' steps at eta_w, here up to {float(eta_w.max()):.6g}, with predictions "
            f"that add up to at least {float(total.min()):.6g}: these must be at most 1 and "
            f"positive, which negative weights with etas {etas.tolist()} have changed"
        )
    return mixed / total


def _limit_rates(
    policy: ZeroVariancePolicy, rates: Sequence[float] | Tensor | None, etas: Tensor
) -> Tensor:
    if policy not in (policies := ("error", "dominate", "ratio")):
        raise InvalidSchedule(f"zero_variance is {policy!r}, expected one of {policies}")
    if (rates is None) == (policy == "ratio"):
        raise InvalidSchedule(f"rates={rates!r} with zero_variance={policy!r}: 'ratio' takes rates")
    if rates is None:
        return torch.ones_like(etas)
    values = as_host_float64(rates, "rates")
    if values.shape != etas.shape:
        raise InvalidShape(
            f"rates have shape {tuple(values.shape)}, expected (M,) = {tuple(etas.shape)}"
        )
    if not ((values > 0) & values.isfinite()).all():
        raise InvalidSchedule(f"rates must be positive and finite, got {values.tolist()}")
    return values

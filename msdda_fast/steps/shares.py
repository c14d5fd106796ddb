# SPDX-License-Identifier: Apache-2.0
r"""How much each objective counts in a fused step (Eq. 7), and what decides where variances vanish.

With s = min_i sigma_i^2 over the active objectives (w_i != 0) and r_i = s / sigma_i^2,

    share_i = w_i r_i / sum_j w_j r_j,      sigma_w^2 = s / sum_j w_j r_j,

which neither overflows nor divides by zero. It is the limit itself where s = 0: the objectives of
zero variance share among themselves, by weight, or by w_i / c_i^2 when they vanish at rates c_i.
Where all deviations have a common factor, as DDIM's eta_i sqrt(v_t) do, eta_i stands for sigma_i.

Every entry point asks here, `fast_fuse_step` included; the C++ and Triton kernels repeat
`scaled_weights` per element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape, InvalidWeights, ZeroVariance
from msdda_fast.levels import ETA
from msdda_fast.tracing import values_are_readable
from msdda_fast.weights import as_host_float64, normalise_weights

if TYPE_CHECKING:
    from msdda_fast.types import ZeroVariancePolicy

__all__ = [
    "check_policy",
    "effective_weights",
    "eps_mixture",
    "fold_rates",
    "fusion_shares",
    "has_no_limit",
    "scaled_weights",
]


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
        etas: Broadcastable to `weights`, float64 on the host, >= 0: DDIM's etas, or any rates
            proportional to the standard deviations.
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
    rates = None if rates is None else as_host_float64(rates, "rates")
    check_policy(zero_variance, rates, etas.shape[-1])
    zero, spread = etas == 0, etas.expand_as(weights)
    if zero_variance == "error":
        mixed = has_no_limit(zero, weights, axis=-1, common_factor=True)
        if mixed.any():
            row = mixed[..., 0].nonzero()[0].tolist()
            raise ZeroVariance(
                f"etas {_row(spread, row)} with weights {_row(weights, row)} mix zero and positive "
                f"variance, which has no unique limit; use etas all 0 or all positive, or "
                f"zero_variance='dominate' (those with eta = 0 decide) or 'ratio' (likewise, with "
                f"shares w_i / rates_i^2)"
            )
    folded = weights if rates is None else fold_rates(weights, zero, rates, axis=-1)
    scaled, smallest = scaled_weights(spread, folded, axis=-1, squared=True)
    total = scaled.sum(-1, keepdim=True)
    if not (total > 0).all():
        row = (~(total > 0))[..., 0].nonzero()[0].tolist()
        raise InvalidWeights(
            f"weights {_row(weights, row)} with etas {_row(spread, row)} leave the total "
            f"precision sum w_i / eta_i^2 at or below 0; it must be positive"
        )
    return scaled / total, (smallest / total.sqrt()).squeeze(-1)


def scaled_weights(
    spreads: Tensor, weights: Tensor, *, axis: int = 0, squared: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `w_i r_i`, 0 where inactive, and the smallest active spread `s`, that axis kept.

    Args:
        spreads: Variances, or with `squared` standard deviations: r_i = s / spread_i is then
            squared. Zeros are allowed, and their limit returned.
        weights: Broadcastable to `spreads`, and they to it.
        axis: Of the objectives.
        squared: Whether spreads are deviations; squaring them first could underflow.
    """
    active = weights != 0
    least = torch.where(active, spreads, torch.inf).amin(axis, keepdim=True)
    ratio = torch.where(spreads == least, 1.0, least / spreads)  # 1 where both are zero
    if squared:
        ratio = ratio**2
    return torch.where(active, weights * ratio, 0.0), least


def check_policy(policy: ZeroVariancePolicy, rates: Tensor | None, count: int) -> None:
    """Raise unless `policy` is one, and comes with rates (M,) > 0 if it is "ratio" and only then.

    Values of rates are checked on the host only, and not under a tracer.

    Raises:
        InvalidSchedule: An unknown policy, or rates that are missing, not positive or unused.
        InvalidShape: `rates` is not (M,).
    """
    if policy not in (policies := ("error", "dominate", "ratio")):
        raise InvalidSchedule(f"zero_variance is {policy!r}, expected one of {policies}")
    if (rates is None) == (policy == "ratio"):
        raise InvalidSchedule(f"rates={rates!r} with zero_variance={policy!r}: 'ratio' takes rates")
    if rates is None:
        return
    if rates.shape != (count,):
        raise InvalidShape(f"rates have shape {tuple(rates.shape)}, expected (M,) = ({count},)")
    if values_are_readable(rates) and not bool(((rates > 0) & rates.isfinite()).all()):
        raise InvalidSchedule(f"rates must be positive and finite, got {rates.tolist()}")


def has_no_limit(zero: Tensor, weights: Tensor, *, axis: int, common_factor: bool) -> Tensor:
    """Where active objectives of zero variance meet others, and "error" raises; that axis kept.

    Args:
        zero: Whether a variance is 0, broadcastable to `weights`, and they to it.
        weights: Preferences; an objective is active where its weight is not 0.
        axis: Of the objectives.
        common_factor: Whether variances that vanish together are known to do so at the same rate,
            which leaves the weights as shares. True for etas; for given moments it is unknown.
    """
    active = weights != 0
    vanishing = (active & zero).any(axis, keepdim=True)
    if common_factor:
        return vanishing & (active & ~zero).any(axis, keepdim=True)
    return vanishing & (active.expand_as(active & zero).sum(axis, keepdim=True) > 1)


def fold_rates(weights: Tensor, zero: Tensor, rates: Tensor, *, axis: int) -> Tensor:
    """Return `w_i / c_i^2` where a variance is 0, up to a common factor, and `w_i` elsewhere.

    Args:
        weights: Preferences, objectives along `axis`.
        zero: Whether a variance is 0, broadcastable to `weights`, and they to it.
        rates: c, (M,), > 0, in the dtype of `weights`.
        axis: Of the objectives.
    """
    shape = [1] * weights.ndim
    shape[axis] = -1
    c = rates.view(shape)
    return torch.where(zero, weights / (c / c.amin()) ** 2, weights)


def effective_weights(
    weights: Tensor | Sequence[Any], etas: Tensor | Sequence[float], *, extrapolate: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the weights and the eta at which DB-MPA equals MSDDA in the limit T -> infinity.

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
        ETA.check_one(value, f"objective {index}")
    share, eta_w = fusion_shares(normalise_weights(values, axis=-1, extrapolate=extrapolate), eta)
    return share * (1 + eta**2) / (1 + eta_w[..., None] ** 2), eta_w


def eps_mixture(share: Tensor, scale: Tensor) -> Tensor:
    """Return `what_i = share_i B_i / sum_j share_j B_j`, the mixture of noise predictions.

    It has the mean of the fused step when all objectives are stepped at one level. For DDIM, whose
    B tends to 0 for small steps, it tends to `effective_weights`.

    Args:
        share: (T, B, M) from `fusion_shares`.
        scale: B > 0, what a noise prediction counts in each objective's step, up to a factor per
            step: `MixingRule.eps_scale` of the objectives' levels.

    Returns:
        (T, B, M), sum 1 over M.

    Raises:
        InvalidWeights: Predictions cancel, which needs negative weights.
    """
    mixed = share * scale
    total = mixed.sum(-1, keepdim=True)
    if not (total > 0).all():
        raise InvalidWeights(
            f"fusion='eps' mixes predictions that add up to at least {float(total.min()):.6g}: "
            f"this must be positive, which negative weights have changed"
        )
    return mixed / total


def _row(values: Tensor, index: list[int]) -> list[float]:
    row: list[float] = values[tuple(index)].tolist()
    return row

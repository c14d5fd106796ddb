# SPDX-License-Identifier: Apache-2.0
"""Checks and uploads the variances and weights of `fast_fuse_step`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape, InvalidWeights, ZeroVariance
from msdda_fast.steps.shares import check_policy, fold_rates, has_no_limit, scaled_weights
from msdda_fast.tracing import values_are_readable
from msdda_fast.types import ZeroVariancePolicy
from msdda_fast.weights import normalise_weights

__all__ = ["as_numbers", "fused_coefficients", "prepare", "with_all_axes"]


def as_numbers(values: Tensor | Sequence[object] | float, name: str) -> Tensor:
    """Real numbers as a tensor; Python ones become float64 on the CPU.

    Raises:
        InvalidShape: `values` are ragged or sparse, or not real numbers.
    """
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(values, dtype=torch.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidShape(f"{name}: expected numbers, got {values!r}: {error}") from None
    if values.layout != torch.strided:
        raise InvalidShape(f"{name} has layout {values.layout}, expected a dense tensor")
    narrow = values.is_floating_point() and values.itemsize == 1  # float8 knows no arithmetic
    if values.is_complex() or values.dtype == torch.bool or narrow:
        raise InvalidShape(f"{name} must be real numbers, got dtype {values.dtype}")
    return values


def with_all_axes(values: Tensor, name: str, count: int, sample: Tensor) -> Tensor:
    """(), (M,), (M, B) or (M, B, *S) with the missing axes appended; `sample` is (B, *S).

    Every axis but the first may have size 1. Tables (M,) and (M, B) may stay on the host.

    Raises:
        InvalidShape: any other shape, or another device than that of `sample`.
    """
    full = (count, *sample.shape)
    if values.ndim == 0:
        values = values.expand(count)
    fits = values.ndim in (1, 2, len(full)) and len(values) == count
    if not fits or any(n not in (1, want) for n, want in zip(values.shape, full, strict=False)):
        forms = f"({count},), {full[:2]} or {full}"
        raise InvalidShape(f"{name} has shape {tuple(values.shape)}, expected {forms}")
    if values.device != sample.device and (values.ndim > 2 or values.device.type != "cpu"):
        raise InvalidShape(f"{name} is on {values.device}, expected {sample.device}")
    return values.reshape(*values.shape, *(1,) * (len(full) - values.ndim))


def prepare(
    variances: Tensor,
    weights: Tensor,
    device: torch.device,
    *,
    zero_variance: ZeroVariancePolicy,
    rates: Sequence[float] | Tensor | None,
    extrapolate: bool,
) -> tuple[Tensor, Tensor]:
    """Check host values, renormalise `weights`, fold `rates` into them where they act, upload.

    Args:
        variances: (M, B | 1, ...), latent units squared, >= 0.
        weights: The same number of axes, sum 1 over the first.
        device: Where to put both.
        zero_variance: "error", "dominate" or "ratio".
        rates: (M,) > 0, for "ratio" only.
        extrapolate: Accept negative weights while every total precision is positive.

    Returns:
        `variances` as given, and `weights` in float64.

    Raises:
        InvalidSchedule: An unknown policy, or rates that are missing, not positive or unused.
        InvalidWeights, InvalidShape, ZeroVariance, ValueError: See `fast_fuse_step`.
    """
    c = None if rates is None else as_numbers(rates, "rates")
    if c is not None and c.device not in (device, torch.device("cpu")):
        raise InvalidShape(f"rates is on {c.device}, expected {device}")
    check_policy(zero_variance, c, len(variances))
    normalised = normalise_weights(weights, axis=0, extrapolate=extrapolate)
    if values_are_readable(variances) and values_are_readable(weights):
        _check_values(variances.detach(), normalised.detach(), zero_variance, extrapolate)
    variances = variances.to(device, non_blocking=True)
    weights = normalised.to(device, non_blocking=True)
    if c is not None:
        weights = fold_rates(weights, variances == 0, c.to(weights), axis=0)
    return variances, weights


def _check_values(
    variances: Tensor, weights: Tensor, zero_variance: ZeroVariancePolicy, extrapolate: bool
) -> None:
    if variances.numel() == 0 or weights.numel() == 0:
        return
    low, high = (float(bound) for bound in variances.aminmax())
    active = weights != 0
    if not (low >= 0 and high < float("inf")):  # NaN fails too
        wrong = active & ~((variances >= 0) & variances.isfinite())
        if bool(wrong.any()):
            value = float(variances.expand_as(wrong)[wrong][0])
            raise ValueError(f"variances must be finite and not negative, got {value!r}")
    if low <= 0 and zero_variance == "error":
        if bool(has_no_limit(variances == 0, weights, axis=0, common_factor=False).any()):
            raise ZeroVariance(
                "a variance of 0 meets other active objectives, and their product has no unique "
                'limit; choose zero_variance="dominate" (those of zero variance decide) or "ratio" '
                "(by the rates at which they vanish)"
            )
    if extrapolate:
        precision = scaled_weights(variances.double(), weights)[0].sum(0)
        if not bool((precision > 0).all()):
            raise InvalidWeights(
                "extrapolated weights leave no positive precision: sum_i w_i / sigma_i^2 is "
                f"{float(precision.min()):.6g} in units of the largest 1 / sigma_i^2"
            )


def fused_coefficients(variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7: `share` (M, ...) and `var_w` (...) in float64; variances and weights broadcast."""
    scaled, least = scaled_weights(variances.double(), weights)
    precision = scaled.sum(0)
    return scaled / precision, least[0] / precision

# SPDX-License-Identifier: Apache-2.0
"""Inputs, the literal torch chain and the error bound that the kernel tests share."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from msdda_fast.reference import ddim_posterior, fuse_posteriors, guide

ALPHA_BAR_T, ALPHA_BAR_PREV = 0.21, 0.27  # a step in the middle of a 50-step schedule
GUIDANCE = 7.5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((1, 4, 8, 8), (3, 5, 17, 7), (2, 13), (2, 16, 3, 9, 7), (1, 4, 40, 41))


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class DDIMCase(NamedTuple):
    """What a step of M guided objectives gets."""

    x_t: Tensor  # (B, *S)
    outputs: Tensor  # (M, 2, B, *S)
    noise: Tensor  # (B, *S)
    weights: Tensor  # (B, M) float64
    etas: Tensor  # (M,) float64


def ddim_case(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> DDIMCase:
    generator = torch.Generator().manual_seed(count * 1000 + len(shape))

    def normal(*lead: int) -> Tensor:
        values = torch.randn((*lead, *shape), generator=generator, dtype=torch.float64)
        return values.to(dtype)

    weights = torch.rand(shape[0], count, generator=generator, dtype=torch.float64) + 0.1
    etas = torch.linspace(0.6, 1.0, count, dtype=torch.float64)
    return DDIMCase(
        normal(), normal(count, 2), normal(), weights / weights.sum(1, keepdim=True), etas
    )


def literal_step(case: DDIMCase, dtype: torch.dtype, clip_range: float | None = None) -> Tensor:
    """Guidance, `ddim_posterior` per objective, Eq. 7 and noise in `dtype`, literally."""
    x_t, outputs, noise = (t.to(dtype) for t in (case.x_t, case.outputs, case.noise))
    moments = [
        ddim_posterior(
            x_t,
            guide(*output, GUIDANCE),
            ALPHA_BAR_T,
            ALPHA_BAR_PREV,
            float(eta),
            clip_range=clip_range,
        )
        for output, eta in zip(outputs, case.etas, strict=True)
    ]
    means = torch.stack([mean for mean, _ in moments])
    variances = torch.stack([variance for _, variance in moments])
    mean, variance = fuse_posteriors(means, variances, case.weights.t().to(dtype))
    return mean + variance.sqrt().expand_as(mean) * noise


class MomentsCase(NamedTuple):
    """What `fast_fuse_step` gets."""

    means: Tensor  # (M, B, *S)
    variances: Tensor  # (M,), (M, B) or (M, B, *S) float64
    weights: Tensor  # likewise
    noise: Tensor  # (B, *S)


def moments_case(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, variance_axes: int, weight_axes: int
) -> MomentsCase:
    """`*_axes` is how many axes variances and weights have: 1, 2 or 1 + len(shape)."""
    generator = torch.Generator().manual_seed(count * 77 + variance_axes * 7 + weight_axes)
    full = (count, *shape)
    means = torch.randn(full, generator=generator, dtype=torch.float64).to(dtype)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    variances, weights = (
        torch.rand(full[:axes], generator=generator, dtype=torch.float64) + 0.1
        for axes in (variance_axes, weight_axes)
    )
    return MomentsCase(means, variances, weights / weights.sum(0, keepdim=True), noise)


def literal_fusion(case: MomentsCase, dtype: torch.dtype) -> Tensor:
    """Eq. 7 and noise in `dtype`."""
    means, variances, weights, noise = (t.to(dtype) for t in case)
    mean, variance = fuse_posteriors(means, variances, weights)
    std = variance.sqrt()
    return mean + std.reshape(*std.shape, *(1,) * (mean.ndim - std.ndim)) * noise


def assert_accurate(fast: Tensor, literal: Tensor, exact: Tensor) -> None:
    """max |fast - exact| <= 2 max |literal - exact| + 1 ulp, all in the dtype of `fast`.

    `literal` was computed in float32 and is rounded here, as the fast path rounds its result.
    """
    largest = float(exact.abs().max())
    ulp = torch.finfo(fast.dtype).eps * 2.0 ** math.floor(math.log2(largest))
    error = float((fast.double() - exact).abs().max())
    allowed = 2 * float((literal.to(fast.dtype).double() - exact).abs().max()) + ulp
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

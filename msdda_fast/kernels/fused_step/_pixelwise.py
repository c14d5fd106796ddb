# SPDX-License-Identifier: Apache-2.0
"""A fused step with weights of every pixel: the objectives' own means, then Eq. 7 on them.

It takes M launches of the linear kernel, of which each writes one mean, and one of the moments
kernel, which fuses and draws.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from msdda_fast.kernels.raw import FusedStepBackend

__all__ = ["run_pixelwise"]


def run_pixelwise(
    raw: FusedStepBackend,
    out: Tensor,
    x: Tensor,
    outputs: Sequence[Tensor | None],
    means: Sequence[Tensor],
    rows: Tensor,
    variances: Tensor,
    weights: Tensor,
    *,
    step: int | Tensor = 0,
    clip_range: float | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
) -> None:
    """Write x_prev; see `kernels.raw` for the arguments that are not here.

    Args:
        raw: Of one backend.
        out: (B, *S), written; may be `x` itself.
        means: M tensors (B, *S) in the dtype of `weights`, written.
        rows: Coefficients of the means, (M, B | 1, C), or (M, T, B | 1, C) of which `step` is used.
        variances: (M, B | 1), latent units squared.
        weights: (M, B, *S), up to a factor per pixel; axes of S may be 1.
        noise: (B, *S).
    """
    for mean, own in zip(means, rows, strict=True):
        raw.run(mean, x, outputs, own, step=step, clip_range=clip_range)
    variances = variances.reshape(*variances.shape, *(1,) * (out.ndim - 1))
    raw.run_moments(out, means, variances, weights, step=step, noise=noise, seeds=seeds)

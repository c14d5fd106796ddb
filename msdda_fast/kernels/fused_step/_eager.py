# SPDX-License-Identifier: Apache-2.0
"""The fused step in plain torch: runs anywhere, differentiates, and fixes the order of operations.

Inputs of any float dtype, arithmetic in the dtype of the coefficients (float32 or float64), terms
added one by one in the order written below. A zero coefficient replaces its input by zero before
the product, so that NaN and Inf there reach neither the value nor the gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.kernels.counter_noise import STREAM_STEP
from msdda_fast.kernels.counter_noise._eager import run as counter_noise
from msdda_fast.steps.coefficients import Layout
from msdda_fast.steps.shares import scaled_weights

__all__ = ["run", "run_moments"]


def run(
    out: Tensor,
    x: Tensor | None,
    outputs: Sequence[Tensor | None],
    rows: Tensor,
    *,
    step: int | Tensor = 0,
    clip_range: float | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    next_input: Tensor | None = None,
) -> None:
    """out = x_scale x + sum_m (uncond_m u_m + cond_m c_m [+ clipped x_0 term]) + noise_scale z."""
    layout = Layout(len(outputs), clip_range is not None)
    if rows.ndim == 3:
        rows = _entry(rows, step)
    if noise is not None and noise.ndim > out.ndim:
        noise = _entry(noise, step)
    columns = rows.t().reshape(rows.shape[1], rows.shape[0], *(1,) * (out.ndim - 1))
    uncond, cond = columns[layout.uncond], columns[layout.cond]
    total = torch.zeros_like(out, dtype=rows.dtype)
    if x is not None:
        total = _add(total, columns[layout.x_scale], x)
    for m, output in enumerate(outputs):
        if output is None:
            continue
        branches = [(uncond, output[0])] if len(output) == 2 else []
        branches.append((cond, output[-1]))
        for coefficient, value in branches:
            total = _add(total, coefficient[m], value)
        if clip_range is not None and x is not None:
            x_0 = _add(torch.zeros_like(total), columns[layout.x0_x], x)
            x0_coefficients = (columns[layout.x0_uncond], columns[layout.x0_cond])[-len(branches) :]
            for coefficient, (_, value) in zip(x0_coefficients, branches, strict=True):
                x_0 = _add(x_0, coefficient[m], value)
            x_0 = x_0.clamp(-clip_range, clip_range)
            total = _add(total, columns[layout.x0_scale][m], x_0)
    z = _draw(total, noise, seeds, step)
    out.copy_(total if z is None else _add(total, columns[layout.noise_scale], z))
    if next_input is not None:
        next_input.copy_(out)


def run_moments(
    out: Tensor,
    means: Sequence[Tensor],
    variances: Tensor,
    weights: Tensor,
    *,
    step: int | Tensor = 0,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> None:
    """Eq. 7 elementwise, by ratios to the smallest active variance; see `steps.shares`."""
    scaled, least = scaled_weights(variances, weights)
    total = torch.zeros_like(out, dtype=weights.dtype)
    precision = torch.zeros_like(scaled[0])
    for m, mu in enumerate(means):
        total = _add(total, scaled[m], mu)
        precision = precision + scaled[m]
    total = total / precision
    fused_variance = least[0] / precision
    z = _draw(total, noise, seeds, step)
    # through float64: torch.sqrt on float32 is 1 ulp off on some CPU builds
    std = fused_variance.double().sqrt().to(total.dtype)
    out.copy_(total if z is None else _add(total, std, z))
    if mean is not None:
        mean.copy_(total)
    if variance is not None:
        variance.copy_(fused_variance)


def _add(total: Tensor, coefficient: Tensor, value: Tensor) -> Tensor:
    safe = torch.where(coefficient != 0, value.to(total.dtype), 0.0)
    return total + coefficient * safe


def _entry(table: Tensor, step: int | Tensor) -> Tensor:
    """`table[step]`, without reading a step that is on the device."""
    return table[step] if isinstance(step, int) else table.index_select(0, step.view(1))[0]


def _draw(
    like: Tensor, noise: Tensor | None, seeds: Tensor | None, step: int | Tensor
) -> Tensor | None:
    if seeds is None:
        return noise
    z = torch.empty_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
    counter_noise(z, seeds, step, STREAM_STEP)
    return z

# SPDX-License-Identifier: Apache-2.0
"""The fused step in C++: every input read once, the result written once.

float32, float64, bfloat16 and float16 in and out; arithmetic in the dtype of the coefficients, in
the order of `_eager.py`. Inputs of any layout: on the CPU, those that are not contiguous are copied
first. Tensors on a GPU go to `_native_cuda.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast import _C
from msdda_fast.kernels import native
from msdda_fast.kernels.counter_noise import STREAM_STEP
from msdda_fast.kernels.fused_step import _native_cuda

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
    if out.device.type == "cuda":
        return _native_cuda.run(
            out,
            x,
            outputs,
            rows,
            step=step,
            clip_range=clip_range,
            noise=noise,
            seeds=seeds,
            next_input=next_input,
        )
    step = int(step)
    rows = (rows[step] if rows.ndim == 3 else rows).contiguous()
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=_ROW_MAJOR)
    x = None if x is None else x.contiguous()
    if noise is not None:
        noise = (noise[step] if noise.ndim > out.ndim else noise).contiguous()
    uncond, cond, keep_alive, dtype = [], [], [], torch.float32
    for output in outputs:
        if output is None:
            uncond.append(0)
            cond.append(0)
            continue
        output = output.contiguous()
        keep_alive.append(output)
        dtype = output.dtype
        address, branch = output.data_ptr(), out.numel() * output.element_size()
        uncond.append(address if output.shape[0] == 2 else 0)
        cond.append(address + branch * (output.shape[0] - 1))
    _C.linear_step(
        native.array(target),
        native.array(x),
        uncond,
        cond,
        native.CODES[dtype],
        native.array(rows),
        0 if rows.shape[0] == 1 else rows.shape[1],
        clip_range,
        native.array(noise),
        _seeded(seeds, step),
        native.sizes(out),
        torch.get_num_threads(),
    )
    if target is not out:
        out.copy_(target)
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
    if out.device.type == "cuda":
        return _native_cuda.run_moments(
            out,
            means,
            variances,
            weights,
            step=step,
            noise=noise,
            seeds=seeds,
            mean=mean,
            variance=variance,
        )
    means = [mu.contiguous() for mu in means]
    results = [out, mean, variance]
    targets = [
        t if t is None or t.is_contiguous() else torch.empty_like(t, memory_format=_ROW_MAJOR)
        for t in results
    ]
    noise = None if noise is None else noise.contiguous()
    (variances, variance_table), (weights, weight_table) = (
        _table(t, out) for t in (variances, weights)
    )
    _C.moments_step(
        native.array(targets[0]),
        [mu.data_ptr() for mu in means],
        native.CODES[means[0].dtype],
        variance_table,
        weight_table,
        native.CODES[weights.dtype],
        *(native.array(t)[0] for t in targets[1:]),
        native.array(noise),
        _seeded(seeds, int(step)),
        native.sizes(out),
        torch.get_num_threads(),
    )
    for result, target in zip(results, targets, strict=True):
        if result is not None and target is not None and target is not result:
            result.copy_(target)


_ROW_MAJOR = torch.contiguous_format


def _seeded(seeds: Tensor | None, step: int) -> tuple[int, int, int]:
    return (0, 0, 0) if seeds is None else (seeds.data_ptr(), step, STREAM_STEP)


def _table(values: Tensor, out: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """(M, 1 | B, ...) as the tensor to keep alive and its address with strides; see `Table`."""
    pixelwise = any(n != 1 for n in values.shape[2:])
    if pixelwise:
        values = values.expand(*values.shape[:2], *out.shape[1:])
    values = values.contiguous()
    sample = values[0, 0].numel() if values.numel() else 0
    batched = values.shape[1] != 1
    strides = (sample * values.shape[1], sample if batched else 0, int(pixelwise))
    return values, (values.data_ptr(), *strides)

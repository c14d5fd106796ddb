# SPDX-License-Identifier: Apache-2.0
"""The fused step in CUDA C++: one launch, every input read once, the result written once.

float32, float64, bfloat16 and float16 in and out; arithmetic in the dtype of the coefficients, in
the order of `_eager.py` and with its bits. The kernel reads NCHW and NHWC tensors in place; any
other layout is copied first. A step tensor is read by the kernel, so that a captured graph replays
every step; the caller keeps it within the table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast import _C
from msdda_fast.errors import InvalidShape
from msdda_fast.kernels import native
from msdda_fast.kernels.counter_noise import STREAM_STEP

__all__ = ["run", "run_moments"]

View = tuple[int, int, int, int]  # native.strided


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
    _check_count(len(outputs))
    if isinstance(step, Tensor):
        step = step.to(out.device)
    else:
        rows = rows[step] if rows.ndim == 3 else rows
        noise = noise[step] if noise is not None and noise.ndim > out.ndim else noise
    rows = rows.contiguous()
    row_stride = 0 if rows.shape[-2] == 1 else rows.shape[-1]
    target = _dense_target(out)
    x = None if x is None else _dense(x)
    noise = None if noise is None else _dense(noise, out.ndim)
    layout, branches = _alike([branch for t in outputs if t is not None for branch in t])
    taken = iter(branches)
    uncond, cond = [], []
    for output in outputs:
        halves = [next(taken).data_ptr() for _ in range(0 if output is None else len(output))]
        uncond.append(halves[0] if len(halves) == 2 else 0)
        cond.append(halves[-1] if halves else 0)
    dense_next = None
    if next_input is not None and len(next_input):
        dense_next = native.channel_strides(next_input.shape[1:], next_input.stride()[1:])
    copies = (native.strided(None), 0, 0)
    if next_input is not None and dense_next is not None:
        first = (next_input.data_ptr(), native.CODES[next_input.dtype], *dense_next)
        copies = (first, len(next_input), next_input.stride(0))
    _C.cuda_linear_step(
        native.strided(target),
        native.strided(x),
        copies,
        layout,
        uncond,
        cond,
        (*native.array(rows), rows.stride(0) if rows.ndim == 3 else 0, row_stride),
        clip_range,
        _given(noise, out.ndim),
        _seeds(seeds),
        native.counter(step),
        native.sizes(out),
        native.queue(out),
    )
    if target is not out:
        out.copy_(target)
    if next_input is not None and dense_next is None:
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
    _check_count(len(means))
    if isinstance(step, Tensor):
        step = step.to(out.device)
    layout, means = _alike(list(means))
    results = [out, mean, variance]
    targets = [None if t is None else _dense_target(t) for t in results]
    noise = None if noise is None else _dense(noise)
    tables = [_numbers(t, out) for t in (variances, weights)]
    _C.cuda_moments_step(
        native.strided(targets[0]),
        layout,
        [mu.data_ptr() for mu in means],
        *(table for _, table in tables),
        native.CODES[weights.dtype],
        *(native.strided(t) for t in targets[1:]),
        _given(noise, out.ndim),
        _seeds(seeds),
        native.counter(step),
        native.sizes(out),
        native.queue(out),
    )
    for result, target in zip(results, targets, strict=True):
        if result is not None and target is not None and target is not result:
            result.copy_(target)


def _check_count(count: int) -> None:
    if count > _C.cuda_max_objectives:
        raise InvalidShape(
            f"got {count} objectives; the CUDA kernel takes up to {_C.cuda_max_objectives}, "
            'backend="eager" any number'
        )


def _dense(tensor: Tensor, ndim: int | None = None) -> Tensor:
    """The tensor, or a copy where its last `ndim` axes (all) are neither NCHW nor NHWC."""
    first = 0 if ndim is None else tensor.ndim - ndim
    strides = native.channel_strides(tensor.shape[first:], tensor.stride()[first:])
    return tensor.contiguous() if strides is None else tensor


def _dense_target(tensor: Tensor) -> Tensor:
    """The tensor, or a new one to be copied into it."""
    if native.channel_strides(tensor.shape, tensor.stride()) is not None:
        return tensor
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _alike(tensors: list[Tensor]) -> tuple[View, list[Tensor]]:
    """Tensors of one dense layout, copied if they are not, and that layout."""
    layouts = {native.channel_strides(t.shape, t.stride()) for t in tensors}
    if None in layouts or len(layouts) > 1:
        tensors = [t.contiguous() for t in tensors]
    return native.strided(tensors[0] if tensors else None), tensors


def _given(noise: Tensor | None, ndim: int) -> tuple[View, int]:
    """Noise (B, *S), or (T, B, *S) with the stride of its first axis."""
    if noise is None or noise.ndim == ndim:
        return native.strided(noise), 0
    return native.strided(noise[0]), noise.stride(0)


def _seeds(seeds: Tensor | None) -> tuple[int, int]:
    return (0, 0) if seeds is None else (seeds.data_ptr(), STREAM_STEP)


def _numbers(values: Tensor, out: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """(M, 1 | B, 1 | *S) as the tensor to keep alive, and its address with strides (M, B, C, P)."""
    pixelwise = any(n != 1 for n in values.shape[3:])
    if pixelwise:
        values = values.expand(*values.shape[:3], *out.shape[2:])
    values = values.contiguous()
    pixels = values[0, 0, 0].numel() if values.ndim > 3 and values.numel() else 1
    channels = values.shape[2] if values.ndim > 2 else 1
    sample = channels * pixels
    strides = (
        values.shape[1] * sample,
        sample if values.shape[1] != 1 else 0,
        pixels if channels != 1 else 0,
        int(pixelwise),
    )
    return values, (values.data_ptr(), *strides)

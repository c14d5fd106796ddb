# SPDX-License-Identifier: Apache-2.0
"""The fused step in Triton: one launch for any number of objectives, on CUDA or the interpreter.

Dense inputs are read where they lie, row-major or channels last; others are copied first. With a
step tensor on the device nothing is read on the host, so a captured graph can replay the launch.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.kernels.current_device import on_its_device
from msdda_fast.kernels.fused_step._triton_linear import linear_step
from msdda_fast.kernels.fused_step._triton_moments import moments_step
from msdda_fast.steps.coefficients import Layout

__all__ = ["run", "run_moments"]

#: Objectives up to this many are unrolled, each with its own pointer; beyond, a loop.
UNROLLED = 16
_ROW_MAJOR, _LAST, _LAST4 = 0, 1, 2  # layouts; see `_triton_tile`
_THREADS = 128  # of a program
#: Nothing is contracted: a fused product and sum is another number.
LAUNCH = {"num_warps": _THREADS // 32, "enable_fp_fusion": False}


@on_its_device
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
    if out.numel() == 0:
        return
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    target, out_layout = _writable(out, out.ndim)
    x, x_layout = _readable(x, out.ndim)
    noise, noise_layout = _readable(noise, out.ndim)
    read, outputs_layout, stacked = _objectives(outputs, out.ndim)
    copies, next_layout = _writable(next_input, out.ndim)
    step, on_device = _step(step, out)
    values = [v for t in outputs if t is not None for v in t]  # u and c of each objective
    values = [x, *([] if stacked else values)]
    # clipping holds them while it makes x_0 of them
    grid, sizes, block = _tiling(out, [noise, *values * (1 if clip_range is None else 2)])
    linear_step[grid](
        target, x, read, rows, noise, seeds, copies, step, *sizes,
        row_step=rows.stride(0) if rows.ndim == 3 else 0,
        row_sample=rows.stride(-2) if rows.shape[-2] > 1 else 0,
        copies=1 if copies is None else len(copies),
        M=len(outputs), COLUMNS=columns(len(outputs), clips=clip_range is not None),
        BRANCHES=len(read) if stacked else tuple(0 if t is None else len(t) for t in read),
        STACKED=stacked, STEP_POINTER=on_device, RANGE=clip_range,
        NOISE_TABLE=noise is not None and noise.ndim > out.ndim,
        OUT=out_layout, X=x_layout, OUTPUTS=outputs_layout, NOISE=noise_layout, NEXT=next_layout,
        **block,
    )  # fmt: skip
    _deliver(target, out)
    _deliver(copies, next_input)


@on_its_device
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
    if out.numel() == 0:
        return
    target, out_layout = _writable(out, out.ndim)
    noise, noise_layout = _readable(noise, out.ndim)
    read, means_layout, stacked = _objectives(means, out.ndim)
    moments = [t if t is None or t.is_contiguous() else _like(t) for t in (mean, variance)]
    variances, variances_pixelwise = _table(variances, out)
    weights, weights_pixelwise = _table(weights, out)
    step, on_device = _step(step, out)
    numbers = [variances] * variances_pixelwise + [weights] * weights_pixelwise
    # in a loop the numbers of an objective are read twice
    values = [means[0], *numbers * 2] if stacked else [*means, *numbers * len(means)]
    grid, sizes, block = _tiling(out, [noise, *values])
    moments_step[grid](
        target, read, variances, weights, *moments, noise, seeds, step, *sizes,
        variances.shape[1], weights.shape[1],
        M=len(means), STACKED=stacked, STEP_POINTER=on_device,
        NOISE_TABLE=noise is not None and noise.ndim > out.ndim,
        VARIANCES=variances_pixelwise, WEIGHTS=weights_pixelwise,
        OUT=out_layout, MEANS=means_layout, NOISE=noise_layout,
        **block,
    )  # fmt: skip
    _deliver(target, out)
    for result, wanted in zip(moments, (mean, variance), strict=True):
        _deliver(result, wanted)


def columns(count: int, *, clips: bool) -> tuple[int, ...]:
    """Where a row holds `x_scale, uncond, cond, noise_scale, x0_x, x0_uncond, x0_cond, x0_scale`.

    The kernel is compiled for these: they are what M makes of them, or 0 where there are no such.
    """
    layout = Layout(count, clips)
    linear = (layout.x_scale, layout.uncond.start, layout.cond.start, layout.noise_scale)
    if not clips:
        return (*linear, 0, 0, 0, 0)
    x0 = (layout.x0_uncond.start, layout.x0_cond.start, layout.x0_scale.start)
    return (*linear, layout.x0_x, *x0)


def _layout(tensor: Tensor, axes: int) -> int | None:
    """Layout of the samples, (B, *S) in the last `axes` axes; None: not one of the dense ones."""
    if tensor.is_contiguous():
        return _ROW_MAJOR
    channel = tensor.ndim - axes + 1
    if axes > 1 and tensor.movedim(channel, -1).is_contiguous():
        return _LAST4 if tensor.shape[channel] == 4 else _LAST
    return None


def _readable(tensor: Tensor | None, axes: int) -> tuple[Tensor | None, int]:
    if tensor is None:
        return None, _ROW_MAJOR
    layout = _layout(tensor, axes)
    return (tensor, layout) if layout is not None else (tensor.contiguous(), _ROW_MAJOR)


def _writable(tensor: Tensor | None, axes: int) -> tuple[Tensor | None, int]:
    """The tensor itself, or a row-major stand-in that `_deliver` copies from."""
    if tensor is None:
        return None, _ROW_MAJOR
    layout = _layout(tensor, axes)
    return (tensor, layout) if layout is not None else (_like(tensor), _ROW_MAJOR)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _deliver(written: Tensor | None, wanted: Tensor | None) -> None:
    if wanted is not None and written is not None and written is not wanted:
        wanted.copy_(written)


def _objectives(
    tensors: Sequence[Tensor | None], axes: int
) -> tuple[tuple[Tensor | None, ...] | Tensor, int, bool]:
    """The objectives as one argument, their common layout, and whether it holds only the first.

    From the first of them, the others then follow at a constant distance.
    """
    layouts = {_layout(t, axes) for t in tensors if t is not None}
    layout = next(iter(layouts)) if len(layouts) == 1 else None
    if layout is None:
        layout = _ROW_MAJOR
        tensors = [None if t is None else t.contiguous() for t in tensors]
    if len(tensors) <= UNROLLED:
        return tuple(tensors), layout, False
    first = tensors[0]
    if first is not None and all(
        t is not None
        and t.shape == first.shape
        and t.data_ptr() == first.data_ptr() + m * first.nbytes
        for m, t in enumerate(tensors)
    ):
        return first, layout, True
    present = next(t for t in tensors if t is not None)
    whole = (2, *present.shape[1:]) if present.ndim > axes else present.shape
    filled = [present.new_zeros(whole) if t is None else t.expand(whole) for t in tensors]
    return torch.stack(filled)[0], _ROW_MAJOR, True


def _step(step: int | Tensor, out: Tensor) -> tuple[int | Tensor, bool]:
    if isinstance(step, Tensor) and step.device == out.device:
        return step, True
    return int(step), False


def _table(values: Tensor, out: Tensor) -> tuple[Tensor, bool]:
    """(M, 1 | B, ...) as the kernel reads it, and whether it varies by pixel."""
    pixelwise = any(n != 1 for n in values.shape[2:])
    if pixelwise:
        values = values.expand(*values.shape[:2], *out.shape[1:])
    return values.contiguous(), pixelwise


def _tiling(
    out: Tensor, read: Sequence[Tensor | None]
) -> tuple[tuple[int], tuple[int, int, int, int], dict[str, int | bool]]:
    """The grid; B, channels, pixels and tiles per sample; and how a program is launched.

    Args:
        out: (B, *S).
        read: One tensor per value that a position of one channel reads.
    """
    batch, channels = out.shape[0], out.shape[1] if out.ndim > 1 else 1
    pixels = out.numel() // (batch * channels)
    positions = -(-channels // 4) * pixels
    if positions > 2**31 - 2048:
        raise InvalidShape(f"a sample of shape {tuple(out.shape[1:])} has more than 2^33 values")
    tile = _THREADS * pixels_per_thread(sum(t.element_size() for t in read if t is not None))
    # 128-bit accesses pay once every multiprocessor has a few tiles; a small step wants threads.
    # The interpreter pays by the program.
    block = tile if batch * positions >= 2**18 or triton.knobs.runtime.interpret else _THREADS
    tiles = triton.cdiv(positions, block)
    return (batch * tiles,), (batch, channels, pixels, tiles), {"BLOCK": block, **LAUNCH}


def pixels_per_thread(bytes_read: int) -> int:
    """1 to 8 pixels, of four channels each, whose `bytes_read` per value fit in the registers.

    All loads of a thread are in flight at once: about 128 registers of them leave room for the rest
    (tests/kernels/test_triton_code.py compiles every case and finds no spill).
    """
    return min(8, 1 << max(0, (128 // max(bytes_read, 1)).bit_length() - 1))

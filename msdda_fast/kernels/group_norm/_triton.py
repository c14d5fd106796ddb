# SPDX-License-Identifier: Apache-2.0
"""Group norm in Triton: two launches that read a picture in channels_last as it lies.

The first gives every tile of pixels its mean and its sum of squared distances from it, per group;
the second combines these and writes the result. x is read twice, y written once, sums are float32,
and the result is rounded once. The groups of an image lie next to each other in memory, but have
widths such as 10: a tile is (pixels, groups, channels rounded up).

Triton's builtins only; see `grouped_lora`. `tl.standard._sum_combine` is what `tl.sum` reduces by:
the interpreter knows it, and would add by any other function element by element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdda_fast.kernels.current_device import on_its_device

__all__ = ["CHUNKS", "WARPS", "group_norm_apply", "group_norm_moments", "launch", "run", "tile"]

#: Elements of a tile: 16 in each thread of 8 warps.
_TILE = 4096
WARPS = 8
#: Tiles whose moments are combined at a time.
CHUNKS = 64


@triton.jit
def _read(
    x_ptr, shift_ptr, first_pixel, first_group, row, pixels, channels, groups, per_group,
    shift_step, PIXELS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of x + shift, its offsets from the image, its channels and which of it is inside."""
    pixel = first_pixel + tl.arange(0, PIXELS)[:, None, None]
    group = first_group + tl.arange(0, GROUPS)[None, :, None]
    member = tl.arange(0, WIDTH)[None, None, :]
    channel = group * per_group + member
    inside = (pixel < pixels) & (group < groups) & (member < per_group)
    offset = pixel.to(tl.int64) * channels + channel
    x = tl.load(x_ptr + row * pixels * channels + offset, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        used = (group < groups) & (member < per_group)
        shift = tl.load(shift_ptr + row * shift_step + channel, mask=used, other=0.0)
        x += shift.to(tl.float32)
    return x, offset, channel, inside


@triton.jit
def _by_group(x):
    members = tl.reduce(x, 2, tl.standard._sum_combine)
    return tl.reduce(members, 0, tl.standard._sum_combine)


@triton.jit(do_not_specialize=["pixels", "shift_step", "chunks"])
def group_norm_moments(
    x_ptr,  # [rows, pixels, C] dense
    shift_ptr,  # [rows or 1, C], channels adjacent; None: 0
    moments_ptr,  # [rows, groups, chunks, 2] float32: mean, sum of squared distances
    pixels,
    channels,  # C
    groups,
    per_group,  # C / groups
    shift_step,  # between the shifts of two rows; 0: one for all
    chunks,  # tiles of pixels in an image
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # per_group rounded up
):
    chunk = tl.program_id(0)
    first_group = tl.program_id(1) * GROUPS
    row = tl.program_id(2).to(tl.int64)
    x, _, _, inside = _read(
        x_ptr, shift_ptr, chunk * PIXELS, first_group, row, pixels, channels, groups, per_group,
        shift_step, PIXELS, GROUPS, WIDTH,
    )  # fmt: skip
    number = (tl.minimum(pixels - chunk * PIXELS, PIXELS) * per_group).to(tl.float32)
    total = _by_group(tl.where(inside, x, 0.0))
    mean = total / number
    off = tl.where(inside, x - mean[None, :, None], 0.0)
    squares = _by_group(off * off)
    group = first_group + tl.arange(0, GROUPS)
    target = moments_ptr + ((row * groups + group) * chunks + chunk) * 2
    tl.store(target, mean, mask=group < groups)
    tl.store(target + 1, squares, mask=group < groups)


@triton.jit(do_not_specialize=["pixels", "shift_step", "chunks"])
def group_norm_apply(
    x_ptr,  # [rows, pixels, C] dense
    shift_ptr,  # [rows or 1, C], channels adjacent; None: 0
    moments_ptr,  # [rows, groups, chunks, 2] float32, of `group_norm_moments`
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [rows, pixels, C] dense, dtype of x
    pixels,
    channels,  # C
    groups,
    per_group,  # C / groups
    shift_step,  # between the shifts of two rows; 0: one for all
    chunks,  # tiles of pixels in an image
    eps,
    SILU: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,  # per_group rounded up
    CHUNKS: tl.constexpr,
):
    chunk = tl.program_id(0)
    first_group = tl.program_id(1) * GROUPS
    row = tl.program_id(2).to(tl.int64)
    group = first_group + tl.arange(0, GROUPS)[:, None]
    each = tl.arange(0, CHUNKS)[None, :]
    source = moments_ptr + (row * groups + group) * chunks * 2
    number = pixels.to(tl.float32) * per_group
    total = tl.full((GROUPS,), 0.0, tl.float32)
    for start in range(0, chunks, CHUNKS):
        known = (group < groups) & (start + each < chunks)
        means = tl.load(source + (start + each) * 2, mask=known, other=0.0)
        own = tl.minimum(pixels - (start + each) * PIXELS, PIXELS) * per_group
        total += tl.reduce(means * own.to(tl.float32), 1, tl.standard._sum_combine)
    mean = total / number
    squares = tl.full((GROUPS,), 0.0, tl.float32)
    for start in range(0, chunks, CHUNKS):
        known = (group < groups) & (start + each < chunks)
        means = tl.load(source + (start + each) * 2, mask=known, other=0.0)
        within = tl.load(source + (start + each) * 2 + 1, mask=known, other=0.0)
        own = tl.minimum(pixels - (start + each) * PIXELS, PIXELS) * per_group
        apart = tl.where(known, means - mean[:, None], 0.0)
        squares += tl.reduce(
            within + apart * apart * own.to(tl.float32), 1, tl.standard._sum_combine
        )
    scale = 1.0 / tl.sqrt_rn(squares / number + eps)

    x, offset, channel, inside = _read(
        x_ptr, shift_ptr, chunk * PIXELS, first_group, row, pixels, channels, groups, per_group,
        shift_step, PIXELS, GROUPS, WIDTH,
    )  # fmt: skip
    used = channel < channels
    weight = tl.load(weight_ptr + channel, mask=used, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=used, other=0.0).to(tl.float32)
    y = (x - mean[None, :, None]) * scale[None, :, None] * weight + bias
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    target = out_ptr + row * pixels * channels + offset
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=inside)


def tile(groups: int, per_group: int) -> dict[str, int]:
    """Return the block sizes for groups of this many channels."""
    width = triton.next_power_of_2(per_group)
    count = min(triton.next_power_of_2(groups), max(1, 64 // width))
    return {"PIXELS": max(1, _TILE // (width * count)), "GROUPS": count, "WIDTH": width}


@on_its_device
def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """See `kernels.raw.GroupNormBackend`."""
    rows, channels = x.shape[:2]
    pixels = x[0, 0].numel()
    size = tile(groups, channels // groups)
    chunks = triton.cdiv(pixels, size["PIXELS"])
    out = torch.empty_like(x, memory_format=torch.channels_last)
    moments = x.new_empty(rows, groups, chunks, 2, dtype=torch.float32)
    grid = (chunks, triton.cdiv(groups, size["GROUPS"]), rows)
    shift_step = 0 if shift is None or len(shift) == 1 else shift.stride(0)
    sizes = (pixels, channels, groups, channels // groups, shift_step, chunks)
    group_norm_moments[grid](x, shift, moments, *sizes, **size, num_warps=WARPS)
    group_norm_apply[grid](
        x, shift, moments, weight, bias, out, *sizes, eps, SILU=silu, **size, CHUNKS=CHUNKS,
        num_warps=WARPS,
    )  # fmt: skip
    return out


# an opaque operator, as `grouped_lora` is
_OP = "msdda_fast::group_norm"
torch.library.define(
    _OP,
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? shift, bool silu) "
    "-> Tensor",
)
torch.library.impl(_OP, "CompositeExplicitAutograd", launch)


@torch.library.register_fake(_OP)
def _shape(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, shift: Tensor | None,
    silu: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.channels_last)


run = torch.ops.msdda_fast.group_norm.default

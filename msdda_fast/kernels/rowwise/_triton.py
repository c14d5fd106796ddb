# SPDX-License-Identifier: Apache-2.0
"""Sums, layer norms and gates of rows in Triton: one launch each, everything read once.

Triton's builtins only; see `grouped_lora`. `tl.standard._sum_combine` is what `tl.sum` reduces by:
the interpreter knows it, and would add by any other function element by element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdda_fast.kernels.current_device import on_its_device

__all__ = [
    "BLOCK",
    "WARPS",
    "gated",
    "geglu",
    "launch_geglu",
    "launch_sum_and_norm",
    "launch_sum_of",
    "norm_block",
    "sum_and_norm",
    "sum_of",
    "summed",
    "summed_and_normed",
]

#: Channels of a program that needs none of its neighbours: 8 in each thread, 16 bytes in half.
BLOCK, WARPS = 512, 2


@triton.jit
def summed(
    a_ptr,  # [rows, C] dense
    b_ptr,  # [rows, C] dense
    bias_ptr,  # [C], or None
    out_ptr,  # [rows, C] dense
    channels,  # C
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * channels
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    total = tl.load(b_ptr + first + channel, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(a_ptr + first + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + first + channel, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def summed_and_normed(
    a_ptr,  # [rows, C] dense
    b_ptr,  # [rows, C] dense
    bias_ptr,  # [C], or None
    weight_ptr,  # [C], or None
    shift_ptr,  # [C], or None
    sum_ptr,  # [rows, C] dense
    out_ptr,  # [rows, C] dense
    channels,  # C
    eps,
    BLOCK: tl.constexpr,  # C rounded up
):
    first = tl.program_id(0).to(tl.int64) * channels
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    total = tl.load(b_ptr + first + channel, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(a_ptr + first + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + first + channel, total.to(sum_ptr.dtype.element_ty), mask=inside)
    mean = tl.reduce(total, 0, tl.standard._sum_combine) / channels
    off = tl.where(inside, total - mean, 0.0)
    y = off / tl.sqrt_rn(tl.reduce(off * off, 0, tl.standard._sum_combine) / channels + eps)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + first + channel, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated(
    x_ptr,  # [rows, 2, C] dense: value, gate
    out_ptr,  # [rows, C] dense
    channels,  # C
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    source = x_ptr + row * 2 * channels + channel
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + channels, mask=inside, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out_ptr + row * channels + channel, y.to(out_ptr.dtype.element_ty), mask=inside)


def norm_block(channels: int) -> dict[str, int]:
    """Return block size and warps of a norm: at most 16 elements in a thread, if 8 warps do."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}


@on_its_device
def launch_sum_of(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """See `kernels.raw.RowwiseBackend`."""
    channels = a.shape[-1]
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    grid = (a.numel() // channels, triton.cdiv(channels, BLOCK))
    summed[grid](a.contiguous(), b.contiguous(), bias, out, channels, BLOCK=BLOCK, num_warps=WARPS)
    return out


@on_its_device
def launch_sum_and_norm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `kernels.raw.RowwiseBackend`."""
    channels = a.shape[-1]
    total, out = (torch.empty_like(a, memory_format=torch.contiguous_format) for _ in range(2))
    summed_and_normed[(a.numel() // channels,)](
        a.contiguous(), b.contiguous(), bias, weight, shift, total, out, channels, eps,
        **norm_block(channels),
    )  # fmt: skip
    return total, out


@on_its_device
def launch_geglu(x: Tensor) -> Tensor:
    """See `kernels.raw.RowwiseBackend`."""
    channels = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], channels)
    grid = (out.numel() // channels, triton.cdiv(channels, BLOCK))
    gated[grid](x.contiguous(), out, channels, BLOCK=BLOCK, num_warps=WARPS)
    return out


# opaque operators, as `grouped_lora` is
_SUM = "Tensor a, Tensor b, Tensor? bias"
for _name, _signature, _launch in (
    ("sum_of", f"({_SUM}) -> Tensor", launch_sum_of),
    (
        "sum_and_norm",
        f"({_SUM}, Tensor? weight, Tensor? shift, float eps) -> (Tensor, Tensor)",
        launch_sum_and_norm,
    ),
    ("geglu", "(Tensor x) -> Tensor", launch_geglu),
):
    torch.library.define(f"msdda_fast::{_name}", _signature)
    torch.library.impl(f"msdda_fast::{_name}", "CompositeExplicitAutograd", _launch)


@torch.library.register_fake("msdda_fast::sum_of")
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.register_fake("msdda_fast::sum_and_norm")
def _(
    a: Tensor, b: Tensor, bias: Tensor | None, weight: Tensor | None, shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = torch.empty_like(a, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


@torch.library.register_fake("msdda_fast::geglu")
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


sum_of = torch.ops.msdda_fast.sum_of.default
sum_and_norm = torch.ops.msdda_fast.sum_and_norm.default
geglu = torch.ops.msdda_fast.geglu.default

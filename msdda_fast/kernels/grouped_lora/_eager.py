# SPDX-License-Identifier: Apache-2.0
"""Grouped LoRA in plain torch: with separate factors, folded into the base, or merged.

Each function launches the base GEMM and at most two more. The update is added in place, because an
out-of-place `baddbmm` first copies its input: one more pass over the output.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["add_updates", "fold", "run", "run_folded", "run_folded_conv", "run_merged"]


def run(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """The reference, three launches: base, x A^T, and (x A^T) B^T added to the base."""
    return add_updates(functional.linear(x, weight, bias), x, down, up)


def add_updates(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Add (x[m] A_m^T) B_m^T to y[m] in place, and return y.

    Args:
        y: (M, rows, N).
        x: (M, rows, C).
        down: A_m, (M, R, C).
        up: B_m with the scale folded in, (M, N, R).
    """
    return y.baddbmm_(torch.bmm(x, down.mT), up.mT)


def fold(weight: Tensor, bias: Tensor | None, down: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows [W; A_1; ...; A_M; 0] and bias [b; 0] of the folded base.

    Args:
        weight: (N, C, *k).
        bias: (N,) or None.
        down: (M, R, C, *k).

    Returns:
        (P, C, *k) and (P,) or None, P = N + M R rounded up to 8, which keeps rows of half
        precision 16-byte aligned.
    """
    rows = down.flatten(0, 1).to(weight)
    spare = -(len(weight) + len(rows)) % 8
    padding = weight.new_zeros(spare, *weight.shape[1:])
    folded = torch.cat([weight, rows, padding])
    return folded, bias if bias is None else functional.pad(bias, (0, len(folded) - len(bias)))


def run_folded(x: Tensor, folded: Tensor, bias: Tensor | None, up: Tensor) -> Tensor:
    """Two launches: the folded base, and (x A^T) B^T added to it.

    Group m keeps only its own M R-th of the extra columns, which is a strided view. The result is a
    view of the first N columns: rows are P apart, elements of a row adjacent.
    """
    count, n, rank = up.shape
    extended = functional.linear(x, folded, bias)  # (M, rows, P)
    every = extended.narrow(2, n, count * rank).view(*extended.shape[:2], count, rank)
    own = every.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (M, rows, R)
    return extended.narrow(2, 0, n).baddbmm_(own, up.mT)


def run_merged(x: Tensor, merged: Tensor, bias: Tensor | None) -> Tensor:
    """x[m] W_m^T + b with `merged` (M, N, C): one launch for one objective or without a bias.

    A batched product first copies the bias into its result, another launch.
    """
    if len(merged) == 1:
        return functional.linear(x, merged[0], bias)
    return torch.bmm(x, merged.mT) if bias is None else torch.baddbmm(bias, x, merged.mT)


def run_folded_conv(
    x: Tensor,
    folded: Tensor,
    bias: Tensor | None,
    up: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> Tensor:
    """The folded base convolution, then B_m as a 1x1 convolution of group m's own channels.

    The sum is out of place, since a convolution or norm that reads the result would copy a view
    with gaps. In channels_last this is `run_folded`; in NCHW the B_m and the R channels are first
    copied once per image, since a batched product takes one stride over images and groups.

    Args:
        x: (M I, C, H, W), NCHW or channels_last.
        folded: (P, C, kh, kw), from `fold`.
        bias: (P,) or None.
        up: (M, N, R).
        stride, padding, dilation: Those of the base convolution.

    Returns:
        (M I, N, H', W') dense, in the memory format the base convolution gives.
    """
    count, n, rank = up.shape
    extended = functional.conv2d(x, folded, bias, stride, padding, dilation)
    images, _, height, width = extended.shape
    # a 1x1 picture is both formats at once; either branch is right for it
    if extended.is_contiguous(memory_format=torch.channels_last):
        pixels = extended.permute(0, 2, 3, 1).view(count, -1, len(folded))
        every = pixels.narrow(2, n, count * rank).view(*pixels.shape[:2], count, rank)
        own = every.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (M, I H' W', R)
        y = torch.baddbmm(pixels.narrow(2, 0, n), own, up.mT)
        return y.view(images, height, width, n).permute(0, 3, 1, 2)
    pixels = extended.view(count, -1, len(folded), height * width)
    every = pixels.narrow(2, n, count * rank).view(count, -1, count, rank, height * width)
    own = every.diagonal(dim1=0, dim2=2).permute(3, 0, 1, 2)  # (M, I, R, H' W')
    per_image = up.repeat_interleave(images // count, dim=0)
    base = pixels.flatten(0, 1).narrow(1, 0, n)
    y = torch.baddbmm(base, per_image, own.reshape(images, rank, height * width))
    return y.view(images, n, height, width)

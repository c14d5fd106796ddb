# SPDX-License-Identifier: Apache-2.0
"""The preprocessing of CLIP-like rewards as differentiable tensor code.

The published preprocessing works on 8-bit images: resize, crop, normalise. Here nothing is rounded,
so the gradient of a reward reaches the image; on 8-bit input the two differ by rounding only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def crop_square(images: Tensor, size: int, *, floor: bool = False) -> Tensor:
    """Resize the shorter side to `size` and cut out the centre.

    Args:
        images: Shape (N, 3, H, W) in [0, 1].
        size: Side of the result in pixels.
        floor: Round half of an odd margin down, as transformers does; else to even, as torchvision
            does.
    Returns: shape (N, 3, size, size) in [0, 1].
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    images = _resize(images, (int(size * height / short), int(size * width / short)))
    top, left = (
        (side - size) // 2 if floor else round((side - size) / 2) for side in images.shape[-2:]
    )
    return images[..., top : top + size, left : left + size]


def pad_square(images: Tensor, size: int) -> Tensor:
    """Resize the longer side to `size` and pad the shorter one with black on both sides.

    Args:
        images: Shape (N, 3, H, W) in [0, 1].
        size: Side of the result in pixels.
    Returns: shape (N, 3, size, size) in [0, 1].
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = _resize(images, (round(height * scale), round(width * scale)))
    down, right = (size - side for side in images.shape[-2:])
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def normalise(images: Tensor) -> Tensor:
    """Subtract the mean and divide by the deviation of CLIP's training images, per channel."""
    mean = torch.tensor(CLIP_MEAN, dtype=images.dtype, device=images.device)
    std = torch.tensor(CLIP_STD, dtype=images.dtype, device=images.device)
    return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize, bicubic and antialiased, rows first; each pass is clamped, as 8-bit images are."""
    for shape in ((images.shape[-2], size[1]), size):
        if tuple(images.shape[-2:]) != shape:
            images = F.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    return images

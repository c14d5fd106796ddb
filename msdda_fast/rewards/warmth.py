# SPDX-License-Identifier: Apache-2.0
"""Warmth of colours as a reward.

L.-C. Ou, M. R. Luo, A. Woodcock and A. Wright, "A study of colour emotion and colour preference.
Part I: colour emotions for single colours", Color Research and Application 29(3), 2004: the
warm-cool scale fitted to the ratings of observers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.rewards.checks import check_images

# linear sRGB to XYZ over the white of D65, so that white is (1, 1, 1)
_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750),
           (0.0193339, 0.1191920, 0.9503041))  # fmt: skip
_WARM_HUE = math.radians(50.0)


def lab(images: Tensor) -> Tensor:
    """Return CIELAB (L* in [0, 100], a*, b*; D65) of sRGB images in [0, 1], both (N, 3, H, W).

    The conversion is that of IEC 61966-2-1 and CIE 15, and differentiable everywhere.
    """
    # each branch sees only its own half, or the gradient of the other half would be NaN
    linear = torch.where(
        images <= 0.04045, images / 12.92, ((images.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4
    )
    matrix = torch.tensor(_TO_XYZ, dtype=images.dtype, device=images.device)
    xyz = torch.einsum("ij,njhw->nihw", matrix / matrix.sum(1, keepdim=True), linear)
    edge = (6 / 29) ** 3
    f = torch.where(xyz > edge, xyz.clamp_min(edge) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def warm_cool(images: Tensor) -> Tensor:
    """Return the mean of WC = -0.5 + 0.02 C*^1.07 cos(h - 50 degrees) over the pixels.

    C* and h are chroma and hue angle in CIELAB. Positive values are warm: pure red is 2.35, pure
    blue -1.39, grey -0.5.

    Args:
        images: Shape (N, 3, H, W), sRGB in [0, 1].
    Returns: shape (N,).
    """
    _, a, b = lab(images).unbind(1)
    # C* cos(h - 50) is the part of (a, b) along the warm hue; C*^0.07 has no gradient at grey
    along = a * math.cos(_WARM_HUE) + b * math.sin(_WARM_HUE)
    chroma = (a.square() + b.square() + torch.finfo(images.dtype).eps).sqrt()
    return (-0.5 + 0.02 * chroma**0.07 * along).mean((1, 2))


class Warmth:
    """r = 4 WC + 1: about [-2, 2] on the shipped model's images, comparable with the other rewards.

    Over that model's samples for the training prompts the mean is 0.1 and the deviation 0.9; within
    a prompt, the correlation is 0.4 with aesthetic and -0.2 with consistency.
    """

    name = "warmth"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1]; the prompts do not matter.

        Raises: InvalidShape: the images have the wrong shape, or not one prompt each.
        """
        check_images(images, prompts)
        return 4 * warm_cool(images.float()) + 1

# SPDX-License-Identifier: Apache-2.0
"""Colourfulness as the aesthetic reward.

D. Hasler and S. Suesstrunk, "Measuring colourfulness in natural images", Human Vision and
Electronic Imaging VIII, SPIE 5007, 2003: a measure fitted to the ratings of observers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.rewards.checks import check_images


def colourfulness(images: Tensor) -> Tensor:
    """Return M = sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2) on the 0-255 scale.

    Here rg = R - G and yb = (R + G)/2 - B. The paper's scale runs from 0 (not colourful) through 33
    (moderately) to 109 (extremely colourful).

    Args:
        images: Shape (N, 3, H, W), sRGB in [0, 1].
    Returns: shape (N,).
    """
    red, green, blue = (255 * images).flatten(2).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    variance = rg.var(-1, correction=0) + yb.var(-1, correction=0)
    mean = rg.mean(-1).square() + yb.mean(-1).square()
    # The roots have no gradient at 0, where a grey image sits.
    floor = torch.finfo(images.dtype).tiny
    return (variance + floor).sqrt() + 0.3 * (mean + floor).sqrt()


class Aesthetic:
    """r = M / 25 - 2: about [-2, 2] on the shipped model's images, comparable with consistency."""

    name = "aesthetic"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1]; the prompts do not matter.

        Raises: InvalidShape: the images have the wrong shape, or not one prompt each.
        """
        check_images(images, prompts)
        return colourfulness(images.float()) / 25 - 2

# SPDX-License-Identifier: Apache-2.0
"""Chroma of the background: what guidance that paints the whole image cannot hide from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.rewards.checks import check_images
from msdda_fast.rewards.warmth import lab

__all__ = ["CHROMA_RANGE", "Background"]

#: Chroma of the backgrounds of the training images, CIELAB units.
CHROMA_RANGE = (4.0, 18.0)


class Background:
    """Median CIELAB chroma C* = (a*^2 + b*^2)^(1/2) over the border of an image, one pixel wide.

    The objects of the shipped model's training images leave most of the border free, so this is the
    chroma of the background, which training images draw from `CHROMA_RANGE`.
    """

    name = "background_chroma"
    differentiable = False

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1]; the prompts do not matter.

        Raises: InvalidShape: the images have the wrong shape, or not one prompt each.
        """
        check_images(images, prompts)
        images = images.float()
        rows, columns = images[:, :, (0, -1)], images[:, :, 1:-1, (0, -1)]
        border = torch.cat([rows.flatten(2), columns.flatten(2)], 2)
        _, a, b = lab(border[:, :, None]).unbind(1)
        return torch.quantile((a.square() + b.square()).sqrt().flatten(1), 0.5, dim=1)

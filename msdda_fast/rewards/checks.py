# SPDX-License-Identifier: Apache-2.0
"""The check that every reward makes of its input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from msdda_fast.errors import InvalidShape


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise `InvalidShape` unless `images` is a float (N, 3, H, W) with one prompt per image."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise InvalidShape(f"images must have shape (N, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise InvalidShape(f"images must be floating point in [0, 1], got {images.dtype}")
    if isinstance(prompts, str) or len(prompts) != len(images):
        count = 1 if isinstance(prompts, str) else len(prompts)
        raise InvalidShape(f"got {len(images)} images and {count} prompts: one prompt per image")

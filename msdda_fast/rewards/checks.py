# SPDX-License-Identifier: Apache-2.0
"""The check that every reward makes of its input, and that its callers make of its output."""

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


def check_scores(name: str, scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the scores (N,) of a reward: one NaN would spoil every mean.

    Raises:
        InvalidShape: There is not one per prompt.
        ValueError: One is not finite; the message names its prompt.
    """
    if tuple(scores.shape) != (len(prompts),):
        raise InvalidShape(
            f"reward {name!r} must return shape ({len(prompts)},), got {tuple(scores.shape)}"
        )
    if not scores.isfinite().all():
        worst = prompts[int((~scores.isfinite()).nonzero()[0])]
        raise ValueError(f"reward {name!r} is not finite for the prompt {worst!r}")
    return scores

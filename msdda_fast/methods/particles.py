# SPDX-License-Identifier: Apache-2.0
"""N copies of each of B samples, copy-major, and the choice of one of them per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from msdda_fast.methods.model import LatentModel, preferred

__all__ = ["best", "check_counts", "initial_copies", "replicate", "score"]

#: Purpose of the x_T that copies other than the first start from.
INITIAL = 1


def initial_copies(model: LatentModel, copies: int) -> Tensor:
    """Independent x_T of N copies, (N B, *S); copy 0 has that of every sampler."""
    x_T = model.initial()
    if copies == 1:
        return x_T
    return torch.cat([x_T, model.noise(0, copies - 1, purpose=INITIAL)])


def replicate(x: Tensor, copies: int) -> Tensor:
    """N equal copies, (N B, ...), of x (B, ...)."""
    return x.repeat(copies, *[1] * (x.ndim - 1))


def score(model: LatentModel, images: Tensor, rows: Tensor | None = None) -> Tensor:
    """r_w of images, (n,); `rows` as in `LatentModel`.

    Raises:
        ValueError: A reward is NaN, which would win every comparison; or it has no gradient where
            the images have one.
    """
    rewards = model.rewards(images, rows)
    for name, values in rewards.items():
        if images.requires_grad and not values.requires_grad:
            raise ValueError(f"reward {name!r} gives no gradient for the images to follow")
        if values.isnan().any():
            raise ValueError(f"reward {name!r} is NaN for {int(values.isnan().sum())} images")
    return preferred(model, rewards)


def best(x: Tensor, scores: Tensor, batch_size: int) -> Tensor:
    """Of the copies x (N B, ...) the one with the highest score (N B,), per sample, (B, ...).

    The first of several equals wins.
    """
    winner = scores.view(-1, batch_size).argmax(0)
    return x[winner * batch_size + torch.arange(batch_size, device=x.device)]


def check_counts(owner: str, **counts: int) -> None:
    """Raise ValueError unless each count is a positive integer; `owner` starts the message."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{owner}: {name} must be a positive integer, got {count!r}")

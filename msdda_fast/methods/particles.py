# SPDX-License-Identifier: Apache-2.0
"""N particles of each of B samples, particle-major, and the choice of one of them per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from msdda_fast.methods.model import LatentModel, preferred

__all__ = ["best", "check_counts", "initial_particles", "replicate", "score"]

#: Purpose of the x_T that particles other than the first start from.
INITIAL = 1


def initial_particles(model: LatentModel, count: int) -> Tensor:
    """Return independent x_T of N particles, (N B, *S); particle 0 has that of every sampler."""
    x_T = model.initial()
    if count == 1:
        return x_T
    return torch.cat([x_T, model.noise(0, count - 1, purpose=INITIAL)])


def replicate(x: Tensor, count: int) -> Tensor:
    """Return N equal particles, (N B, ...), of x (B, ...)."""
    return x.repeat(count, *[1] * (x.ndim - 1))


def score(model: LatentModel, images: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return r_w of images, (n,); `rows` as in `LatentModel`.

    Raises:
        ValueError: A reward is NaN, which would win every comparison; or it has no gradient
            although the images have one.
    """
    rewards = model.rewards(images, rows)
    for name, values in rewards.items():
        if images.requires_grad and not values.requires_grad:
            raise ValueError(f"reward {name!r} gives no gradient for the images to follow")
        if values.isnan().any():
            raise ValueError(f"reward {name!r} is NaN for {int(values.isnan().sum())} images")
    return preferred(model, rewards)


def best(x: Tensor, scores: Tensor, batch_size: int) -> Tensor:
    """Return the particle of x (N B, ...) with the highest score (N B,) of each sample, (B, ...).

    The first of equal scores wins.
    """
    winner = scores.view(-1, batch_size).argmax(0)
    return x[winner * batch_size + torch.arange(batch_size, device=x.device)]


def check_counts(owner: str, **counts: int) -> None:
    """Raise ValueError unless each count is a positive integer; `owner` starts the message."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{owner}: {name} must be a positive integer, got {count!r}")

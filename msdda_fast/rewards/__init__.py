# SPDX-License-Identifier: Apache-2.0
"""Rewards of generated images: one protocol, and the two that ship with `msdda-fast/emoji`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """A score of images given their prompts."""

    name: str
    differentiable: bool  # with respect to the images

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1], one prompt each; return shape (N,)."""
        ...


REWARDS = ("aesthetic", "consistency")


def load_reward(name: str) -> Reward:
    """Load a shipped reward by name.

    Raises:
        ValueError: there is no such reward; the message lists them.
    """
    if name == "aesthetic":
        from msdda_fast.rewards.aesthetic import Aesthetic

        return Aesthetic()
    if name == "consistency":
        from msdda_fast.rewards.consistency import Consistency

        return Consistency.load()
    raise ValueError(f"unknown reward {name!r}; known: {', '.join(REWARDS)}")

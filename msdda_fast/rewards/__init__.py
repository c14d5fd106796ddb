# SPDX-License-Identifier: Apache-2.0
"""Rewards of generated images: the protocol, the shipped rewards, and published ones."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["KNOWN", "REWARDS", "Reward", "load_reward"]


class Reward(Protocol):
    """A score of images given their prompts."""

    name: str
    differentiable: bool  # with respect to the images

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1], one prompt each; return shape (N,)."""
        ...


REWARDS = ("aesthetic", "consistency")  # of the shipped model's own objectives

_SHIPPED = (
    "aesthetic",
    "consistency",
    "warmth",
    "judge_object",
    "judge_color",
    "background_chroma",
)
_PUBLISHED = {
    "clip_score": "ClipScore",
    "hps_v2": "HpsV2",
    "image_reward": "ImageReward",
    "laion_aesthetic": "LaionAesthetic",
    "pick_score": "PickScore",
    "vila": "Vila",
}
KNOWN = (*_SHIPPED, *_PUBLISHED)


def load_reward(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Reward:
    """Load a reward by name: one of `KNOWN`. Its package is imported only here.

    The scores are float32, on the device of the images.

    Args:
        name: A shipped reward (`aesthetic`, `consistency`, `warmth`), the shipped judge's verdict
            on objects or colours (`judge_object`, `judge_color`), the chroma of the background
            (`background_chroma`), or a published reward.
        device: Where a published reward's network runs; shipped ones run where the images are.
        dtype: Data type of a published reward's network; shipped ones are float32.

    Raises:
        ValueError: The reward is unknown; the message lists those that exist.
        RewardUnavailable: Its package or checkpoint is missing; the message says how to get it.
    """
    if name not in KNOWN:
        raise ValueError(f"unknown reward {name!r}; known: {', '.join(KNOWN)}")
    if name == "aesthetic":
        from msdda_fast.rewards.aesthetic import Aesthetic

        return Aesthetic()
    if name == "consistency":
        from msdda_fast.rewards.consistency import Consistency

        return Consistency.load()
    if name == "warmth":
        from msdda_fast.rewards.warmth import Warmth

        return Warmth()
    if name == "background_chroma":
        from msdda_fast.rewards.background_chroma import Background

        return Background()
    if name.startswith("judge_"):
        from msdda_fast.rewards.judge import Judge

        return Judge(name.removeprefix("judge_"))
    module = import_module(f"msdda_fast.rewards.{name}")
    published: Reward = getattr(module, _PUBLISHED[name]).load(device=device, dtype=dtype)
    return published

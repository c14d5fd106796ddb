# SPDX-License-Identifier: Apache-2.0
"""CLIPScore: J. Hessel et al., "CLIPScore: a reference-free evaluation metric for image
captioning", EMNLP 2021."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.rewards.checks import check_images
from msdda_fast.rewards.clip import ClipTowers

MODEL = "openai/clip-vit-base-patch32"  # of the paper
PREFIX = "A photo depicts "
FACTOR = 2.5


class ClipScore:
    """r = 2.5 max(cos(image, "A photo depicts " + prompt), 0), in [0, 2.5], mostly below 1.

    The gradient is 0 where the cosine is negative.

    Args:
        towers: CLIP ViT-B/32.
    """

    name = "clip_score"
    differentiable = True

    def __init__(self, towers: ClipTowers) -> None:
        self._towers = towers

    @classmethod
    def load(
        cls, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ClipScore:
        """Load the paper's model from the hub.

        Raises: RewardUnavailable: the checkpoint is missing.
        """
        return cls(ClipTowers.load(cls.name, MODEL, MODEL, device=device, dtype=dtype))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1]; return shape (N,).

        Raises: InvalidShape: the images have the wrong shape, or not one prompt each.
        """
        check_images(images, prompts)
        texts = self._towers.texts([PREFIX + prompt for prompt in prompts])
        cosine = (self._towers.images(images) * texts).sum(-1)
        return (FACTOR * cosine.clamp_min(0)).to(images.device)

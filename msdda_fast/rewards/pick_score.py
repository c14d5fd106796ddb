# SPDX-License-Identifier: Apache-2.0
"""PickScore: Y. Kirstain et al., "Pick-a-Pic: an open dataset of user preferences for
text-to-image generation", NeurIPS 2023."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.rewards.checks import check_images
from msdda_fast.rewards.clip import ClipTowers

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of the model it was tuned from


class PickScore:
    """r = logit_scale cos(image, prompt): about 100 times the cosine, typically 18 to 24.

    Args:
        towers: A CLIP ViT-H/14 tuned on preferences.
    """

    name = "pick_score"
    differentiable = True

    def __init__(self, towers: ClipTowers) -> None:
        self._towers = towers

    @classmethod
    def load(
        cls, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> PickScore:
        """Load the published model from the hub.

        Raises: RewardUnavailable: the checkpoint is missing.
        """
        towers = ClipTowers.load(cls.name, MODEL, PROCESSOR, device=device, dtype=dtype, floor=True)
        return cls(towers)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1]; return shape (N,).

        Raises: InvalidShape: the images have the wrong shape, or not one prompt each.
        """
        check_images(images, prompts)
        cosine = (self._towers.images(images) * self._towers.texts(prompts)).sum(-1)
        return (self._towers.logit_scale * cosine).to(images.device)

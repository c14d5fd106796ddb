# SPDX-License-Identifier: Apache-2.0
"""ImageReward: J. Xu et al., "ImageReward: learning and evaluating human preferences for
text-to-image generation", NeurIPS 2023."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msdda_fast.rewards.checks import check_images
from msdda_fast.rewards.packages import checkpoint, require
from msdda_fast.rewards.preprocess import crop_square, normalise

MODEL = "ImageReward-v1.0"
# The package's own requirements are old; its code needs these and transformers below 5.
INSTALL = (
    "pip install --no-deps image-reward && pip install 'transformers<5' timm fairscale "
    "torchvision git+https://github.com/openai/CLIP.git"
)
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score over the authors' images
SIZE, MAX_LENGTH = 224, 35


class ImageReward:
    """r = (raw - 0.167) / 1.033: mean 0 and deviation 1 on the authors' images, about [-2.3, 2].

    Args:
        model: An `ImageReward.ImageReward`: `blip` (tokenizer, visual and text encoder) and `mlp`.
    """

    name = "image_reward"
    differentiable = True

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model.eval().requires_grad_(False)

    @classmethod
    def load(
        cls, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ImageReward:
        """Load the published model; the package fetches its checkpoint.

        Raises: RewardUnavailable: the package or the checkpoint is missing.
        """
        package = require(cls.name, "ImageReward", INSTALL)
        with checkpoint(cls.name, "THUDM/ImageReward"):
            model = package.load(MODEL, device=str(device))
        return cls(model.to(device, dtype))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1]; return shape (N,).

        Raises: InvalidShape: the images have the wrong shape, or not one prompt each.
        """
        check_images(images, prompts)
        weight = next(self._model.parameters())
        pixels = normalise(crop_square(images.float(), SIZE)).to(weight.device, weight.dtype)
        blip = self._model.blip
        tokens = blip.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        ).to(weight.device)
        seen = blip.visual_encoder(pixels)
        read = blip.text_encoder(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(
                seen.shape[:-1], dtype=torch.long, device=weight.device
            ),
            return_dict=True,
        )
        raw: Tensor = self._model.mlp(read.last_hidden_state[:, 0]).squeeze(-1).float()
        return ((raw - MEAN) / STD).to(images.device)

# SPDX-License-Identifier: Apache-2.0
"""Human Preference Score v2.1: X. Wu et al., "Human preference score v2: a solid benchmark for
evaluating human preferences of text-to-image synthesis", 2023."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdda_fast.rewards.checks import check_images
from msdda_fast.rewards.packages import checkpoint, require
from msdda_fast.rewards.preprocess import normalise, pad_square

ARCHITECTURE = "ViT-H-14"
SIZE = 224
WEIGHTS = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")


class HpsV2:
    """r = cos(image, prompt) of a tuned CLIP ViT-H/14, without a factor: typically 0.2 to 0.35.

    The weights are read by open_clip, of which the package `hpsv2` contains a copy. Images that are
    not square are padded, as in that package.

    Args:
        model: An open_clip model: `encode_image` and `encode_text`.
        tokenize: Maps texts to token ids, shape (N, L).
    """

    name = "hps_v2"
    differentiable = True

    def __init__(self, model: nn.Module, tokenize: Callable[[list[str]], Tensor]) -> None:
        self._model: Any = model.eval().requires_grad_(False)
        self._tokenize = tokenize

    @classmethod
    def load(
        cls, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> HpsV2:
        """Load the published weights from the hub.

        Raises: RewardUnavailable: open_clip or the checkpoint is missing.
        """
        open_clip = require(cls.name, "open_clip", "pip install open-clip-torch")
        hub = require(cls.name, "huggingface_hub", "pip install huggingface_hub")
        with checkpoint(cls.name, " ".join(WEIGHTS)):
            file = hub.hf_hub_download(*WEIGHTS)
        model = open_clip.create_model(ARCHITECTURE)
        stored = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(stored["state_dict"])
        return cls(model.to(device, dtype), open_clip.get_tokenizer(ARCHITECTURE))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1]; return shape (N,).

        Raises: InvalidShape: the images have the wrong shape, or not one prompt each.
        """
        check_images(images, prompts)
        weight = next(self._model.parameters())
        pixels = normalise(pad_square(images.float(), SIZE)).to(weight.device, weight.dtype)
        seen = F.normalize(self._model.encode_image(pixels).float(), dim=-1)
        tokens = self._tokenize(list(prompts)).to(weight.device)
        told = F.normalize(self._model.encode_text(tokens).float(), dim=-1)
        return (seen * told).sum(-1).to(images.device)

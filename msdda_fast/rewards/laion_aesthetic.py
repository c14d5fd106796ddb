# SPDX-License-Identifier: Apache-2.0
"""The LAION aesthetic predictor: linear layers on the image embedding of CLIP ViT-L/14.

C. Schuhmann, improved-aesthetic-predictor (`sac+logos+ava1-l14-linearMSE`), 2022, trained on
ratings from 1 to 10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from msdda_fast.rewards.checks import check_images
from msdda_fast.rewards.clip import ClipTowers
from msdda_fast.rewards.packages import checkpoint, require

MODEL = "openai/clip-vit-large-patch14"
HEAD = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")  # the author's weights, mirrored


def build_head(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """Build the head that a state dict describes: a sequence of linear layers.

    The published predictor has `layers.N.weight` and `layers.N.bias` with dropout in between, which
    does nothing in evaluation; the original one (LAION, 2022) has a single `weight` and `bias`.

    Raises:
        ValueError: The state dict has no linear layer.
    """
    names = [key.removesuffix("weight") for key in weights if key.endswith("weight")]
    if not names:
        raise ValueError(f"no linear layer in a state dict with {sorted(weights)[:5]}")
    names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    head = nn.Sequential()
    for name in names:
        weight = weights[name + "weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": weights[name + "bias"]})
        head.append(layer)
    return head


class LaionAesthetic:
    """r = head(unit image embedding), on the scale of the ratings, 1 to 10; typically 4 to 7.

    Args:
        towers: CLIP ViT-L/14.
        head: Maps embeddings, shape (N, D), to (N, 1); see `build_head`.
    """

    name = "laion_aesthetic"
    differentiable = True

    def __init__(self, towers: ClipTowers, head: nn.Module) -> None:
        self._towers = towers
        self._head = head.float().eval().requires_grad_(False)

    @classmethod
    def load(
        cls, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LaionAesthetic:
        """Load the published model and head from the hub; the head stays float32.

        Raises: RewardUnavailable: a checkpoint is missing.
        """
        towers = ClipTowers.load(cls.name, MODEL, MODEL, device=device, dtype=dtype)
        hub = require(cls.name, "huggingface_hub", "pip install huggingface_hub")
        with checkpoint(cls.name, " ".join(HEAD)):
            file = hub.hf_hub_download(*HEAD)
        return cls(towers, build_head(torch.load(file, weights_only=True)).to(device))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1]; return shape (N,); prompts do not matter.

        Raises: InvalidShape: the images have the wrong shape, or not one prompt each.
        """
        check_images(images, prompts)
        scores: Tensor = self._head(self._towers.images(images)).squeeze(-1)
        return scores.to(images.device)

# SPDX-License-Identifier: Apache-2.0
"""The two towers of a CLIP model, which several rewards share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdda_fast.rewards.packages import checkpoint, require
from msdda_fast.rewards.preprocess import crop_square, normalise


class ClipTowers:
    """Unit embeddings of images and texts.

    Args:
        model: A `transformers.CLIPModel`.
        tokenizer: Its tokenizer.
        floor: How half of an odd crop margin is rounded; see `crop_square`.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Callable[..., Any], *, floor: bool = False
    ) -> None:
        self._model: Any = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._floor = floor

    @classmethod
    def load(
        cls,
        reward: str,
        model: str,
        tokenizer: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        floor: bool = False,
    ) -> ClipTowers:
        """Load model and tokenizer from folders or hub repositories.

        Raises:
            RewardUnavailable: a checkpoint is missing.
        """
        transformers = require(reward, "transformers", "pip install transformers")
        with checkpoint(reward, model):
            towers = transformers.CLIPModel.from_pretrained(model, dtype=dtype)
        with checkpoint(reward, tokenizer):
            words = transformers.CLIPTokenizer.from_pretrained(tokenizer)
        return cls(towers.to(device), words, floor=floor)

    @property
    def logit_scale(self) -> Tensor:
        """The learned factor of the cosine, about 100 in trained models; shape ()."""
        scale: Tensor = self._model.logit_scale.float().exp()
        return scale

    def images(self, images: Tensor) -> Tensor:
        """Embed images, shape (N, 3, H, W) in [0, 1]; return unit rows, shape (N, D), float32."""
        size = self._model.config.vision_config.image_size
        pixels = normalise(crop_square(images.float(), size, floor=self._floor))
        pixels = pixels.to(self._model.device, self._model.dtype)
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self._model.visual_projection(pooled).float(), dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embed texts, truncated to the model's length; return unit rows, shape (N, D), float32."""
        tokens = self._tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._model.device)
        pooled = self._model.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return F.normalize(self._model.text_projection(pooled).float(), dim=-1)

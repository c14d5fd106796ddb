# SPDX-License-Identifier: Apache-2.0
"""VILA: J. Ke et al., "VILA: learning image aesthetics from user comments with vision-language
pretraining", CVPR 2023."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msdda_fast.rewards.checks import check_images
from msdda_fast.rewards.packages import checkpoint, require

MODEL = "https://tfhub.dev/google/vila/image/1"
INSTALL = "pip install tensorflow tensorflow-hub"


def to_png(image: Tensor) -> bytes:
    """Encode one image, shape (3, H, W) in [0, 1], as an 8-bit PNG."""
    from PIL import Image

    pixels = (255 * image.detach().float().clamp(0, 1)).round().byte().permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.cpu().numpy()).save(file, "PNG")
    return file.getvalue()


class Vila:
    """r = 4 s - 2 in [-2, 2], where s is the model's score in [0, 1].

    The model takes encoded images only, so there is no gradient.

    Args:
        predict: Maps the bytes of one PNG to its score in [0, 1].
    """

    name = "vila"
    differentiable = False

    def __init__(self, predict: Callable[[bytes], float]) -> None:
        self._predict = predict

    @classmethod
    def load(
        cls, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Vila:
        """Load the published model from TensorFlow Hub; TensorFlow chooses device and dtype.

        Raises: RewardUnavailable: TensorFlow, its hub or the checkpoint is missing.
        """
        tensorflow = require(cls.name, "tensorflow", INSTALL)
        hub = require(cls.name, "tensorflow_hub", INSTALL)
        with checkpoint(cls.name, MODEL):
            signature = hub.load(MODEL).signatures["serving_default"]

        def predict(png: bytes) -> float:
            return float(signature(tensorflow.constant(png))["predictions"].numpy().item())

        return cls(predict)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1]; return shape (N,); prompts do not matter.

        Raises: InvalidShape: the images have the wrong shape, or not one prompt each.
        """
        check_images(images, prompts)
        scores = [self._predict(to_png(image)) for image in images]
        return 4 * torch.tensor(scores, device=images.device) - 2

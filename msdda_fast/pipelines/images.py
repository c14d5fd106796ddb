# SPDX-License-Identifier: Apache-2.0
"""Pictures of arrays, as stock pipelines make them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers.image_processor import VaeImageProcessor

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["pictures"]


def pictures(array: np.ndarray) -> Image.Image | list[Image.Image]:
    """Return an image (H, W, C), or the frames of a video (F, H, W, C), of values in [0, 1]."""
    images: list[Image.Image] = VaeImageProcessor.numpy_to_pil(array)
    return images[0] if array.ndim == 3 else images

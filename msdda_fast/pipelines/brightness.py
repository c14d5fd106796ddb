# SPDX-License-Identifier: Apache-2.0
"""What an image says as a mask: how bright it is, where it can be seen."""

from __future__ import annotations

from PIL import Image

__all__ = ["brightness"]


def brightness(mask: Image.Image) -> Image.Image:
    """Return an image in mode L; what is transparent in it is black.

    Raises:
        ValueError: It has more than 8 bits a channel, which Pillow would cut off.
    """
    if mask.mode.startswith(("I", "F")):
        raise ValueError(f"it must have 8 bits a channel, not mode {mask.mode}")
    if mask.has_transparency_data:
        black = Image.new("RGBA", mask.size, "black")
        mask = Image.alpha_composite(black, mask.convert("RGBA"))
    return mask.convert("L")

# SPDX-License-Identifier: Apache-2.0
"""Images that clients send, decoded within bounds: what a file claims is checked before it is read.

Sizes are those after the orientation that a camera has noted (EXIF).
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import IO

from PIL import Image, ImageOps

from msdda_fast.pipelines.brightness import brightness
from msdda_fast.serve.refusals import Refusal

__all__ = ["fitted", "objective_masks", "repainted", "start_image"]

#: Decoders of other formats are not reachable: each is code that reads what strangers send.
FORMATS = ("PNG", "JPEG", "WEBP")

#: Pillow's modes with 8 bits a channel, or fewer.
MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"))

#: Most scans of a JPEG. Progressive ones have about ten; each more is a pass over all pixels, which
#: a file may ask for with 30 bytes.
MOST_SCANS = 100
START_OF_SCAN = b"\xff\xda"  # never within the data of a scan


def start_image(file: IO[bytes], most_pixels: int) -> Image.Image:
    """Return an image to start from, in RGB; what is transparent is white.

    Args:
        file: PNG, JPEG or WebP.
        most_pixels: Largest width x height.

    Raises:
        Refusal: It is none of these, damaged, animated, or too large; `param` is "image".
    """
    image = _read(file, "image", FORMATS, most_pixels)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def repainted(file: IO[bytes], size: tuple[int, int]) -> Image.Image:
    """Return OpenAI's mask as diffusers has it: 255 where the PNG is transparent, 0 where opaque.

    Args:
        file: PNG.
        size: Width and height of the image that it is for, in pixels.

    Raises:
        Refusal: It is no such PNG, or of another size; `param` is "mask".
    """
    mask = _read(file, "mask", ("PNG",), size[0] * size[1])
    _check_size(mask, size, "mask", "the image")
    if not mask.has_transparency_data:
        raise Refusal.of_field("mask", "it must be transparent where the image is to be edited")
    return ImageOps.invert(mask.getchannel("A"))


def objective_masks(masks: Mapping[str, str], size: tuple[int, int]) -> dict[str, Image.Image]:
    """Decode masks of objectives, in mode L.

    Args:
        masks: PNGs in base64, by objective.
        size: Width and height of the drawn image, in pixels.

    Raises:
        Refusal: One is no such PNG, or of another size; `param` is "masks" with the objective.
    """
    found = {}
    for name, text in masks.items():
        field = f"masks.{name}"
        try:
            data = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            raise Refusal.of_field(field, "expected a PNG in base64") from None
        mask = _read(io.BytesIO(data), field, ("PNG",), size[0] * size[1])
        _check_size(mask, size, field, "the drawn image")
        found[name] = brightness(mask)
    return found


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image with the middle of the given one that has the shape of `size`, scaled.

    A mask (mode L) keeps its values: it gets no edges of its own.
    """
    if image.size == size:
        return image
    method = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS
    return ImageOps.fit(image, size, method)


def _read(file: IO[bytes], field: str, formats: tuple[str, ...], most_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=formats)
    except Exception as error:  # decoders raise what they will
        message = f"expected {' or '.join(formats)}, and undamaged: {type(error).__name__}"
        raise Refusal.of_field(field, message) from error
    width, height = image.size
    if width * height > most_pixels:
        message = f"{width} x {height} pixels are more than {most_pixels}"
        raise Refusal.of_field(field, message)
    # the second picture in a JPEG of a phone (MPO) is another view
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise Refusal.of_field(field, "it is animated: send one frame")
    if image.mode not in MODES:
        raise Refusal.of_field(field, f"it must have 8 bits a channel, not mode {image.mode}")
    if image.format in ("JPEG", "MPO") and _scans(file) > MOST_SCANS:
        raise Refusal.of_field(field, f"a JPEG has more than {MOST_SCANS} scans")
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        # here, where a palette whose transparency makes no sense is found out
        return upright.convert("RGBA") if upright.has_transparency_data else upright
    except Exception as error:
        message = f"the {image.format} is damaged: {type(error).__name__}"
        raise Refusal.of_field(field, message) from error


def _scans(file: IO[bytes]) -> int:
    """The scans of a JPEG, and what looks like one in its metadata."""
    place = file.tell()
    file.seek(0)
    count = file.read().count(START_OF_SCAN)
    file.seek(place)
    return count


def _check_size(image: Image.Image, size: tuple[int, int], field: str, other: str) -> None:
    if image.size != size:
        found, wanted = ("{} x {}".format(*pair) for pair in (image.size, size))
        raise Refusal.of_field(field, f"it has {found} pixels, and {other} {wanted}")

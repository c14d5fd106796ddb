# SPDX-License-Identifier: Apache-2.0
"""Images that options name, and videos that commands write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdda_fast.cli import values as parse

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["masks", "read_image", "start", "video_file", "write_video"]

_MOVING = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG", ".apng": "PNG"}
_MP4 = ".mp4"


def read_image(file: str, option: str, *, mask: bool = False) -> Image.Image:
    """Read an image, turned the way its file says: in RGB on white, or as a mask in L on black.

    Raises:
        ValueError: There is no such file, or it is no image of 8 bits a channel, or damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    from msdda_fast.pipelines.brightness import brightness

    try:
        with Image.open(file) as image:
            upright: Any = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):  # which Pillow would cut off at 255
                raise ValueError(
                    f"{option} {file}: it must have 8 bits a channel, not mode {upright.mode}"
                )
            if mask:
                return brightness(upright)
            if upright.has_transparency_data:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            return upright.convert("RGB")  # type: ignore[no-any-return]
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{option} {file}: not an image that Pillow reads: {error}") from None
    except OSError as error:  # missing, a folder, damaged
        raise ValueError(f"{option} {file}: {error.strerror or error}") from None


def masks(texts: list[str]) -> dict[str, Image.Image] | None:
    """Read --mask NAME=FILE, given once for each name; None: not given.

    Raises:
        ValueError: As `read_image`; or a name is given twice.
    """
    form = "NAME=FILE, such as consistency=left.png"
    found = parse.pairs((parse.pair(text, "--mask", str, form) for text in texts), "--mask")
    return {name: read_image(file, "--mask", mask=True) for name, file in found.items()} or None


def start(image: str | None, mask: str | None) -> dict[str, Image.Image]:
    """Read --image and --mask-image, as arguments of a call.

    Raises:
        ValueError: As `read_image`; or a mask is of another size.
    """
    if image is None:
        return {}
    found = {"image": read_image(image, "--image")}
    if mask is not None:
        found["mask_image"] = read_image(mask, "--mask-image", mask=True)
        (width, height), (w, h) = found["image"].size, found["mask_image"].size
        if (w, h) != (width, height):
            raise ValueError(f"--mask-image is {w} x {h} pixels, and --image {width} x {height}")
    return found


def video_file(text: str, option: str) -> tuple[Path, str]:
    """Return a path and the format that its suffix stands for, Pillow's or mp4.

    Raises:
        ValueError: The path is a folder, its suffix is of no format for videos, or what writes mp4
            is not installed.
    """
    from msdda_fast.pipelines import mp4

    path = Path(text)
    if not text or text.endswith("/") or path.is_dir():
        raise ValueError(f"{option} {text!r} is a folder; name a file in it: {path / 'out.webp'}")
    suffix = path.suffix.lower()
    if suffix == _MP4 and (hint := mp4.missing()):
        raise ValueError(
            f"{option} {text!r}: mp4 needs another package ({hint}); {', '.join(_MOVING)} do not"
        )
    if suffix not in (*_MOVING, _MP4):
        raise ValueError(
            f"{option} {text!r} must end in {', '.join(_MOVING)} or {_MP4}, for a video"
        )
    return path, _MOVING.get(suffix, _MP4)


def write_video(frames: Sequence[Image.Image], fps: float, kind: str, file: Path) -> None:
    """Write a video.

    Args:
        frames: At least one, of one size.
        fps: > 0, frames per second.
        kind: From `video_file`.
        file: Where; its suffix is one of the format's.
    """
    if kind == _MP4:
        from msdda_fast.pipelines import mp4

        mp4.write_mp4(frames, fps, file)
        return
    first, *rest = frames
    first.save(file, kind, save_all=True, append_images=rest, duration=1000 / fps, loop=0)

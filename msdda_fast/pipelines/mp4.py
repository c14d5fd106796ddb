# SPDX-License-Identifier: Apache-2.0
"""Writes mp4, where a package that can is installed; diffusers knows two."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers.utils import export_to_video

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["missing", "write_mp4"]


def missing() -> str | None:
    """Return what to install before mp4 can be written; None: nothing."""
    there = find_spec("imageio_ffmpeg" if find_spec("imageio") else "cv2")
    return None if there else "pip install imageio imageio-ffmpeg"


def write_mp4(frames: Sequence[Image.Image], fps: float, file: Path) -> None:
    """Write frames of one size to a file that ends in .mp4, at `fps` > 0 frames per second."""
    export_to_video(list(frames), str(file), fps=round(fps))

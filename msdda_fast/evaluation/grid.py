# SPDX-License-Identifier: Apache-2.0
"""A labelled grid of images: one row per prompt, one column per setting."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from msdda_fast.errors import InvalidShape

__all__ = ["labelled_grid"]

_INK, _SOFT_INK, _PAPER = "#1a1a1a", "#6b6b6b", "#ffffff"


def labelled_grid(
    images: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    cell: int = 160,
) -> Image.Image:
    """Draw images on white, with a label to the left of each row and above each column.

    Args:
        images: R rows of C images of one shape.
        row_labels: R texts, wrapped at words.
        column_labels: C texts; the text after a line break is smaller and lighter.
        cell: Width of an image in the grid, in pixels; images are resampled proportionally.

    Returns: the grid, RGB.

    Raises:
        InvalidShape: There are no images, or the numbers of images and labels do not match.
    """
    columns = len(column_labels)
    if not images or not columns or any(len(row) != columns for row in images):
        lengths = [len(row) for row in images]
        raise InvalidShape(
            f"rows have {lengths} images, expected {columns} each, one per column label"
        )
    if len(row_labels) != len(images):
        raise InvalidShape(f"{len(row_labels)} row labels for {len(images)} rows")
    height = round(cell * images[0][0].height / images[0][0].width)
    gap, margin = max(2, cell // 20), cell // 6
    large = ImageFont.load_default(size=max(9, cell // 9))
    small = ImageFont.load_default(size=max(8, cell // 11))
    label_width, header = round(1.15 * cell), round(0.36 * cell)
    left, top = margin + label_width + gap, margin + header
    size = (
        left + columns * (cell + gap) - gap + margin,
        top + len(images) * (height + gap) - gap + margin,
    )
    grid = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(grid)
    for c, label in enumerate(column_labels):
        first, _, second = label.partition("\n")
        x = left + c * (cell + gap) + cell // 2
        draw.text((x, margin + 0.06 * cell), first, _INK, large, anchor="mm")
        draw.text((x, margin + 0.21 * cell), second, _SOFT_INK, small, anchor="mm")
    for r, (label, row) in enumerate(zip(row_labels, images, strict=True)):
        y = top + r * (height + gap)
        text = _wrap(label, large, label_width, draw)
        draw.multiline_text(
            (margin, y + height // 2), text, _INK, large, anchor="lm", spacing=cell // 24
        )
        for c, image in enumerate(row):
            resized = image.convert("RGB").resize((cell, height), Image.Resampling.LANCZOS)
            grid.paste(resized, (left + c * (cell + gap), y))
    return grid


def _wrap(
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    width: int,
    draw: ImageDraw.ImageDraw,
) -> str:
    """Break `text` between words into lines of at most `width` pixels; words are not split."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)

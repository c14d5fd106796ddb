# SPDX-License-Identifier: Apache-2.0
"""Emoji sprites: rasterised once from open-licence icon sets, recoloured in CIELAB.

`python -m msdda_fast.emoji.sprites ICONS_DIR` rebuilds the shipped PNG files from the
`icons.json` files of the @iconify-json packages named in `SETS`; nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msdda_fast.assets import ASSETS
from msdda_fast.errors import AssetsMissing
from msdda_fast.rewards.grammar import COLORS, OBJECTS

FloatArray = NDArray[np.float64]

SIZE = 96  # pixels per side of a stored sprite
SETS = {  # key -> npm package (version), licence in THIRD_PARTY_NOTICES
    "noto": "noto",
    "fluentflat": "fluent-emoji-flat",
    "noto-v1": "noto-v1",
    "fluent": "fluent-emoji",
    "twemoji": "twemoji",
}
_ICON = {
    "car": "automobile", "dog": "dog", "banana": "banana", "sandwich": "sandwich",
    "giraffe": "giraffe", "sheep": "ewe", "bird": "bird", "bear": "bear", "apple": "red-apple",
    "backpack": "backpack", "cup": "teacup-without-handle", "cell phone": "mobile-phone",
    "book": "closed-book", "vase": "amphora", "clock": "alarm-clock", "hat": "top-hat",
    "chair": "chair",
}  # fmt: skip
_OTHER_ICON = {("noto", "cup"): "hot-beverage", ("twemoji", "cup"): "hot-beverage"}
# No emoji set has a plain table, so each style gets its own drawing (ours).
_TABLE = {
    "noto": (
        '<path fill="#8d5a34" d="M5 12h6l-1 16H6zM27 12h-6l1 16h4z"/>'
        '<path fill="#b07a4c" d="M3 8h26l1 4H2z"/><path fill="#6d4325" d="M2 12h28v2.5H2z"/>'
    ),
    "fluentflat": (
        '<path fill="#7d4b28" d="M4 13h3.5v16H4zM24.5 13H28v16h-3.5z"/>'
        '<path fill="#7d4b28" d="M9.5 13H12v11H9.5zM20 13h2.5v11H20z"/>'
        '<path fill="#a56a3c" d="M6 6h20l4 7H2z"/><path fill="#8a5730" d="M2 13h28v2H2z"/>'
    ),
}
_TABLE |= {"noto-v1": _TABLE["noto"], "fluent": _TABLE["fluentflat"], "twemoji": (
    '<path fill="#8f5f3a" d="M6 14h3l1 14H7zM26 14h-3l-1 14h3z"/>'
    '<ellipse cx="16" cy="11" rx="14" ry="4.5" fill="#b98253"/>'
    '<path fill="#7a4d2c" '
    'd="M2 11c0 3 6 5.5 14 5.5S30 14 30 11v1.6c0 3-6 5.6-14 5.6S2 15.6 2 12.6z"/>'
)}  # fmt: skip
_DROPPED = {
    ("noto-v1", "clock")
}  # its blue case is not the dominant hue: only the bells would change
# Their hue says nothing about the body (coffee in a white cup, icons on a phone): tint everything.
_TINT_WHOLE = {"cup", "cell phone", "hat", "sheep"}

PALETTE = {
    "red": (215, 30, 35), "black": (34, 34, 38), "pink": (250, 130, 190), "blue": (35, 95, 225),
    "green": (40, 160, 60), "white": (246, 246, 246), "orange": (255, 138, 10),
    "yellow": (252, 214, 30), "brown": (125, 76, 38), "purple": (130, 55, 185),
}  # fmt: skip
_CONTRAST = {
    "black": 0.45,
    "white": 0.30,
}  # how much of the sprite's own shading survives; else 0.6

_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = _TO_XYZ.sum(1)


def rgb_to_lab(rgb: FloatArray) -> FloatArray:
    """Convert sRGB in [0, 1], shape (..., 3), to CIELAB (D65)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def lab_to_rgb(lab: FloatArray) -> FloatArray:
    """Convert CIELAB (D65), shape (..., 3), to sRGB clipped to [0, 1]."""
    lightness, a, b = np.moveaxis(lab, -1, 0)
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * _WHITE
    linear = np.clip(xyz @ np.linalg.inv(_TO_XYZ).T, 0, 1)
    rgb: FloatArray = np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    )
    return rgb


def recolor(rgba: FloatArray, color: str, *, whole: bool = False) -> FloatArray:
    """Paint the body of a sprite, shape (H, W, 4) in [0, 1], in one of `COLORS`.

    The body is the part with the dominant hue (or everything but the outline, for `whole` and for
    sprites of low chroma). Its lightness keeps the sprite's own shading: L' = L_c + g (L - median).
    """
    lab = rgb_to_lab(rgba[..., :3])
    alpha = rgba[..., 3]
    lightness, chroma = lab[..., 0], np.hypot(lab[..., 1], lab[..., 2])
    visible = alpha > 0.5
    dark = np.clip((30 - lightness) / 12, 0, 1)  # eyes, wheels, outlines
    if whole or chroma[visible].mean() < 14:
        is_dark_sprite = np.median(lightness[visible]) < 45
        mask = np.ones_like(alpha) if is_dark_sprite else 1 - dark
    else:
        hue = np.degrees(np.arctan2(lab[..., 2], lab[..., 1]))
        votes, edges = np.histogram(
            hue[visible], bins=72, range=(-180, 180), weights=chroma[visible]
        )
        kernel = np.exp(-0.5 * (np.arange(-4, 5) / 2.0) ** 2)
        smooth = np.convolve(np.tile(votes, 3), kernel, mode="same")[72:144]
        dominant = edges[smooth.argmax()] + 2.5
        distance = np.abs((hue - dominant + 180) % 360 - 180)
        mask = np.clip((75 - distance) / 25, 0, 1) * np.clip((chroma - 6) / 10, 0, 1) * (1 - dark)
    body = visible & (mask > 0.5)
    target = rgb_to_lab(np.array(PALETTE[color]) / 255)
    shading = _CONTRAST.get(color, 0.6) * (lightness - np.median(lightness[body]))
    painted = np.empty_like(lab)
    painted[..., 0] = np.clip(target[0] + shading, 3, 98)
    painted[..., 1:] = target[1:]
    rgb = lab_to_rgb(painted) * mask[..., None] + rgba[..., :3] * (1 - mask[..., None])
    return np.concatenate([rgb, rgba[..., 3:]], -1)


def sprite_path(style: str, name: str) -> Path:
    """Return the path of an object's sprite in a set; not every set has every object."""
    return ASSETS / "sprites" / style / f"{name.replace(' ', '-')}.png"


@cache
def painted_sprites(style: str) -> dict[tuple[str, str], FloatArray]:
    """Return {(object, color): (SIZE, SIZE, 4) RGBA in [0, 1]} for the objects that a set has.

    Raises:
        ValueError: There is no such set.
        AssetsMissing: The sprites are not here; wheels leave them out.
    """
    if style not in SETS:
        raise ValueError(f"unknown sprite set {style!r}; known: {', '.join(SETS)}")
    folder = sprite_path(style, "").parent
    if not folder.is_dir():
        raise AssetsMissing(
            f"no sprites in {folder}: a wheel ships the models, not what they were made from; "
            f"install from a checkout (pip install -e .) to render or to train them"
        )
    painted = {}
    for name in OBJECTS:
        path = sprite_path(style, name)
        if path.is_file():
            rgba = np.asarray(Image.open(path).convert("RGBA"), dtype=np.float64) / 255
            for color in COLORS:
                painted[name, color] = recolor(rgba, color, whole=name in _TINT_WHOLE)
    return painted


def _rasterise(icons_dir: Path) -> None:
    import resvg_py

    for style, package in SETS.items():
        (found,) = icons_dir.glob(f"*{package}-[0-9]*/package/icons.json")
        icons = json.loads(found.read_text())
        for name in OBJECTS:
            if name == "table":
                icon = {"body": _TABLE[style], "width": 32, "height": 32}
            else:
                key = _OTHER_ICON.get((style, name), _ICON[name])
                key = icons.get("aliases", {}).get(key, {}).get("parent", key)
                if key not in icons["icons"] or (style, name) in _DROPPED:
                    continue
                icon = icons["icons"][key]
            width = icon.get("width", icons.get("width", 16))
            height = icon.get("height", icons.get("height", 16))
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}" width="{SIZE}" height="{SIZE}">'
                f"{icon['body']}</svg>"
            )
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
            path = sprite_path(style, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(png)).convert("RGBA").save(path, optimize=True)


if __name__ == "__main__":
    _rasterise(Path(sys.argv[1]))

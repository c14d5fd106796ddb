# SPDX-License-Identifier: Apache-2.0
"""Vectorised renderer: painted sprites on pastel backgrounds, a batch of scenes at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from msdda_fast.emoji.sprites import lab_to_rgb, painted_sprites
from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted

IMAGE_SIZE = 64
Uniform = Callable[..., Tensor]  # (*shape) -> uniform numbers in [0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """Ranges of the placement; the defaults are for training images, scorers use wider ones."""

    single: tuple[float, float] = (0.80, 0.90)  # sprite side over image side
    pair: tuple[float, float] = (0.48, 0.52)
    shift: float = 0.02  # of the image side, either way
    rotation: float = 0.0  # degrees, either way
    flip: float = 0.0  # probability


class Renderer:
    """Renders scenes of one or two painted objects from the sprites of some icon sets.

    Args:
        styles: Keys of `sprites.SETS`; each scene draws a style that has its object.
        jitter: Placement ranges.
    """

    def __init__(self, styles: Sequence[str], jitter: Jitter | None = None) -> None:
        self.jitter = jitter or Jitter()
        sheets: list[Tensor] = []
        self._index: dict[tuple[str, str | None], list[int]] = {}
        for style in styles:
            for (name, color), pixels in painted_sprites(style).items():
                self._index.setdefault((name, color), []).append(len(sheets))
                sheets.append(torch.from_numpy(pixels).float())
        rgba = torch.stack(sheets).permute(0, 3, 1, 2)
        premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
        # Two sizes, so that bilinear sampling never skips pixels of a small sprite.
        self._large = F.interpolate(premultiplied, size=64, mode="area")
        self._small = F.interpolate(premultiplied, size=36, mode="bilinear", antialias=True)

    def __call__(self, scenes: Sequence[Sequence[Painted]], generator: torch.Generator) -> Tensor:
        """Render scenes whose objects all have colours; of two, the first is on the left.

        Returns: images, shape (N, 3, 64, 64), in [0, 1].
        """

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        images = self._backgrounds(len(scenes), uniform)
        for slot in (0, 1):
            rows = [n for n, scene in enumerate(scenes) if len(scene) > slot]
            for sheet, paired in ((self._large, False), (self._small, True)):
                chosen = [n for n in rows if (len(scenes[n]) == 2) is paired]
                if chosen:
                    things = [scenes[n][slot] for n in chosen]
                    layer = self._place(sheet, things, slot if paired else None, uniform)
                    images[chosen] = images[chosen] * (1 - layer[:, 3:]) + layer[:, :3]
        return images.clamp_(0, 1)

    def _backgrounds(self, count: int, uniform: Uniform) -> Tensor:
        # Pastel, never white: a white object must stay visible.
        lightness = 70 + 18 * uniform(count)
        hue, chroma = 2 * math.pi * uniform(count), 4 + 14 * uniform(count)
        lab = torch.stack([lightness, chroma * hue.cos(), chroma * hue.sin()], -1)
        top = torch.from_numpy(lab_to_rgb(lab.double().numpy())).float()
        fade = torch.linspace(0, 1, IMAGE_SIZE)[None, None, :, None]
        strength = (0.12 * uniform(count) - 0.06)[:, None, None, None]
        return (top[:, :, None, None] + strength * fade).expand(-1, -1, -1, IMAGE_SIZE).clone()

    def _place(
        self, sheet: Tensor, things: Sequence[Painted], slot: int | None, uniform: Uniform
    ) -> Tensor:
        jitter, count = self.jitter, len(things)
        low, high = jitter.single if slot is None else jitter.pair
        scale = low + (high - low) * uniform(count)
        center = (uniform(count, 2) * 2 - 1) * 2 * jitter.shift
        if slot is not None:
            center[:, 0] += (-0.5, 0.5)[slot]
        angle = math.radians(jitter.rotation) * (uniform(count) * 2 - 1)
        mirror = torch.where(uniform(count) < jitter.flip, -1.0, 1.0)
        cos, sin = angle.cos() / scale, angle.sin() / scale
        theta = torch.stack(
            [torch.stack([cos * mirror, sin * mirror], -1), torch.stack([-sin, cos], -1)], 1
        )
        offset = -(theta @ center[:, :, None])
        grid = F.affine_grid(
            torch.cat([theta, offset], 2), [count, 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False
        )
        pick = [self._pick(thing, uniform) for thing in things]
        return F.grid_sample(sheet[pick], grid, align_corners=False)

    def _pick(self, thing: Painted, uniform: Uniform) -> int:
        known = self._index.get((thing.object, thing.color))
        if known is None:
            raise ValueError(
                f"cannot render {thing}: objects {', '.join(OBJECTS)}; colors {', '.join(COLORS)}"
            )
        return known[int(uniform(1).item() * len(known))]

    def has(self, name: str) -> bool:
        """Return whether one of the sets has a sprite of this object."""
        return (name, COLORS[0]) in self._index

# SPDX-License-Identifier: Apache-2.0
"""Training captions with the long tail of web captions, which leaves alignment room to improve.

Stable Diffusion fails on the paper's prompts because the web shows few blue apples and because web
captions are imprecise. Both causes are reproduced here: natural colours are frequent, and an image
of an object in its natural colour sometimes has the caption of another colour (or a pair has its
colours swapped). Shapes are never wrong, and the test combinations never occur.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from msdda_fast.emoji.prompts import NATURAL_COLOR, caption, is_held_out
from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """Probabilities of the caption long tail."""

    pair: float = 0.35  # two objects
    natural: float = 0.25  # the caption names the natural colour
    colorless: float = 0.08  # the caption names no colour
    loose: float = 0.35  # an odd caption on the natural object (pairs: or with swapped colours)


class CaptionSampler:
    """Draws (caption, scene) with the long tail; neither has a held-out combination."""

    def __init__(self, seed: int = 0) -> None:
        self._tail = Tail()
        self._random = random.Random(seed)

    def __call__(self) -> tuple[str, tuple[Painted, ...]]:
        """Return a caption and the scene to render for it."""
        while True:
            count = 2 if self._random.random() < self._tail.pair else 1
            names = self._random.sample(OBJECTS, count)
            told = tuple(Painted(name, self._told_color(name)) for name in names)
            seen = self._seen(told)
            if not (is_held_out(told) or is_held_out(seen)):
                return caption(told), seen

    def _told_color(self, name: str) -> str | None:
        draw = self._random.random()
        if draw < self._tail.colorless:
            return None
        if draw < self._tail.colorless + self._tail.natural:
            return NATURAL_COLOR[name]
        return self._random.choice(COLORS)

    def _seen(self, told: tuple[Painted, ...]) -> tuple[Painted, ...]:
        colors = [thing.color or NATURAL_COLOR[thing.object] for thing in told]
        if self._random.random() < self._tail.loose:
            if len(told) == 2 and self._random.random() < 0.5:
                colors.reverse()
            else:
                at = self._random.randrange(len(told))
                colors[at] = NATURAL_COLOR[told[at].object]
        return tuple(Painted(t.object, c) for t, c in zip(told, colors, strict=True))

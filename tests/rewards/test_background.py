# SPDX-License-Identifier: Apache-2.0
"""Backgrounds of training images are read as they were drawn."""

import torch

from msdda_fast.emoji.render import Renderer
from msdda_fast.rewards import load_reward
from msdda_fast.rewards.background_chroma import CHROMA_RANGE
from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted


def test_training_images_fill_the_range_and_stay_in_it():
    renderer = Renderer(["noto"])
    scenes = [[Painted(o, c)] for o in OBJECTS for c in COLORS[:4] if renderer.has(o)]
    images = renderer(scenes, torch.Generator().manual_seed(0))
    chroma = load_reward("background_chroma")(images, [""] * len(images))
    low, high = CHROMA_RANGE
    assert low - 0.1 < float(chroma.min()) < low + 2 and high - 2 < float(chroma.max()) < high + 0.1


def test_objects_in_the_middle_do_not_count_and_paint_on_the_border_does():
    images = torch.full((2, 3, 16, 16), 0.5)
    images[0, :, 4:12, 4:12] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    images[1, 0] = 0.9
    found = load_reward("background_chroma")(images, ["", ""])
    assert float(found[0]) < 0.1 and float(found[1]) > 40

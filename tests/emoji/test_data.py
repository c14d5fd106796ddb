# SPDX-License-Identifier: Apache-2.0
"""Prompts, captions, sprites and renders behind the shipped model."""

import pytest
import torch

from msdda_fast.emoji import sprites
from msdda_fast.emoji.captions import CaptionSampler
from msdda_fast.emoji.prompts import TEST_PROMPTS, TRAIN_PROMPTS, caption, held_out
from msdda_fast.emoji.render import Renderer
from msdda_fast.emoji.sprites import PALETTE, SETS, lab_to_rgb, painted_sprites, rgb_to_lab
from msdda_fast.errors import AssetsMissing
from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted, parse


def test_the_papers_table_has_25_prompts_each_and_no_overlap():
    assert len(set(TRAIN_PROMPTS)) == len(set(TEST_PROMPTS)) == 25
    assert not set(TRAIN_PROMPTS) & set(TEST_PROMPTS)


@pytest.mark.parametrize("prompt", TRAIN_PROMPTS + TEST_PROMPTS[:-1])
def test_captions_are_the_papers_sentences(prompt):
    assert caption(parse(prompt)) == prompt


def test_held_out_combinations_are_never_drawn_nor_told():
    singles, pairs = held_out()
    sampler = CaptionSampler(seed=3)
    for _ in range(20_000):
        text, seen = sampler()
        for scene in (seen, parse(text)):
            assert not singles & set(scene)
            assert scene not in pairs and scene[::-1] not in pairs


def test_captions_have_a_long_tail():
    sampler = CaptionSampler(seed=0)
    drawn = [(parse(text), seen) for text, seen in (sampler() for _ in range(5000))]
    wrong = [told[0].color not in (None, seen[0].color) for told, seen in drawn if len(told) == 1]
    assert 0.15 < sum(wrong) / len(wrong) < 0.35
    assert all(told[0].object == seen[0].object for told, seen in drawn)


def test_lab_round_trip():
    rgb = torch.rand(500, 3, dtype=torch.float64)
    there_and_back = torch.from_numpy(lab_to_rgb(rgb_to_lab(rgb.numpy())))
    torch.testing.assert_close(there_and_back, rgb, atol=1e-5, rtol=0)


@pytest.mark.sweep(style=1)
@pytest.mark.parametrize("style", SETS)
def test_a_painted_sprite_is_mostly_its_colour(style):
    """Nearest palette colour of the visible pixels, by vote."""
    palette = rgb_to_lab(torch.tensor([PALETTE[c] for c in COLORS]).double().numpy() / 255)
    right = []
    for (_, color), rgba in painted_sprites(style).items():
        lab = rgb_to_lab(rgba[rgba[..., 3] > 0.9][:, :3])
        nearest = ((lab[:, None] - palette) ** 2).sum(-1).argmin(1)
        votes = torch.bincount(torch.from_numpy(nearest), minlength=len(COLORS))
        right.append(COLORS[int(votes.argmax())] == color)
    assert sum(right) / len(right) > 0.85


def test_renders_are_a_function_of_the_seed():
    renderer = Renderer(("noto",))
    scenes = [[Painted("car", "red")], [Painted("dog", "blue"), Painted("hat", "green")]]
    one, two, other = (renderer(scenes, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one.shape == (2, 3, 64, 64) and 0 <= one.min() and one.max() <= 1
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_an_unknown_thing_names_the_known():
    with pytest.raises(ValueError, match=r"unicorn.*giraffe.*purple"):
        Renderer(("noto",))([[Painted("unicorn", "red")]], torch.Generator())


def test_every_object_has_a_sprite_in_both_training_styles():
    for style in ("noto", "fluentflat"):
        assert {name for name, _ in painted_sprites(style)} == set(OBJECTS)


def test_an_installation_without_sprites_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sprites, "ASSETS", tmp_path)
    painted_sprites.cache_clear()
    with pytest.raises(AssetsMissing, match="install from a checkout"):
        Renderer(("noto",))
    painted_sprites.cache_clear()

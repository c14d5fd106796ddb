# SPDX-License-Identifier: Apache-2.0
"""The shipped scorers on fresh renders, and that the two rewards truly conflict."""

import pytest
import torch

from msdda_fast.emoji.prompts import caption
from msdda_fast.emoji.render import Renderer
from msdda_fast.emoji.train_scorer import HELD_OUT_STYLE, held_out_accuracy
from msdda_fast.rewards import load_reward
from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted
from msdda_fast.rewards.judge import load_judge


@pytest.fixture(scope="module")
def consistency():
    return load_reward("consistency")


def render(things, seed=0):
    renderer = Renderer(("noto", "fluentflat"))
    images = renderer([[thing] for thing in things], torch.Generator().manual_seed(seed))
    return images, [caption([thing]) for thing in things]


def test_right_renders_score_high_and_wrong_prompts_low(consistency):
    things = [Painted(name, color) for name in OBJECTS for color in ("red", "blue", "green")]
    images, prompts = render(things)
    right = consistency(images, prompts)
    other = {"red": "brown", "blue": "orange", "green": "pink"}
    recolored = [caption([Painted(t.object, other[t.color])]) for t in things]
    assert right.mean() > 0.8
    assert (consistency(images, recolored) < right).float().mean() > 0.97
    renamed = prompts[3:] + prompts[:3]  # three colours per object: another object, same colour
    assert (consistency(images, renamed) < right).float().mean() > 0.97
    assert (right <= 1).all() and (right >= 1 - 0.77 * 5.2).all()


def test_in_a_pair_the_side_counts(consistency):
    scenes = [[Painted("car", "red"), Painted("dog", "blue")]] * 8
    images = Renderer(("noto",))(scenes, torch.Generator().manual_seed(0))
    told = consistency(images, ["A red car and a blue dog."] * 8)
    swapped = consistency(images, ["A blue car and a red dog."] * 8)
    assert told.min() > swapped.max()


def test_it_has_a_gradient_to_the_image(consistency):
    images, prompts = render([Painted("dog", "purple")])
    images.requires_grad_()
    consistency(images, prompts).sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().max() > 0


@pytest.mark.parametrize("which", ["reward", "judge"])
def test_scorers_name_drawings_of_a_style_they_never_saw(which, consistency):
    scorer = consistency._scorer if which == "reward" else load_judge()
    accuracy = held_out_accuracy(scorer, (HELD_OUT_STYLE,), count=500)
    assert accuracy["color"] > 0.9
    assert accuracy["object"] > 0.5  # eighteen objects: chance is .06


@pytest.mark.parametrize("color", ["black", "white"])
def test_the_rewards_conflict_where_the_prompt_asks_for_no_colour(color, consistency):
    """Twenty ascent steps on the aesthetic reward cost consistency."""
    aesthetic = load_reward("aesthetic")
    images, prompts = render([Painted(name, color) for name in OBJECTS])
    before = consistency(images, prompts).mean(), aesthetic(images, prompts).mean()
    x = images.clone()
    for _ in range(20):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(aesthetic(x, prompts).sum(), x)
        x = (x + 0.02 * gradient.sign()).clamp(0, 1).detach()
    after = consistency(x, prompts).mean(), aesthetic(x, prompts).mean()
    assert after[1] > before[1] + 1
    assert after[0] < before[0] - 0.1


@pytest.mark.full  # of the shipped rewards together
def test_what_consistency_wants_there_is_what_aesthetic_dislikes():
    aesthetic = load_reward("aesthetic")
    score = {}
    for color in COLORS:
        images, prompts = render([Painted(name, color) for name in OBJECTS])
        score[color] = aesthetic(images, prompts).mean()
    dull = ("black", "white", "brown")
    vivid = min(value for color, value in score.items() if color not in dull)
    assert max(score["black"], score["white"]) < vivid

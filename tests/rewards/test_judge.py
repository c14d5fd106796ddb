# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from msdda_fast.emoji.render import Renderer
from msdda_fast.errors import InvalidShape
from msdda_fast.rewards import load_reward
from msdda_fast.rewards.grammar import Painted


@pytest.fixture(scope="module")
def drawings():
    scenes = [[Painted("car", "red"), Painted("dog", "blue")]] * 8
    return Renderer(("noto",))(scenes, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("prompt", "objects", "colors"),
    [
        ("A red car and a blue dog.", 1.0, 1.0),
        ("A blue car and a red dog.", 1.0, 0.0),
        ("A red dog and a blue car.", 0.0, 1.0),
        ("A red car and a blue cup.", 0.5, 1.0),
    ],
)
def test_the_fraction_that_is_named_right(drawings, prompt, objects, colors):
    found = {w: load_reward(f"judge_{w}")(drawings, [prompt] * 8) for w in ("object", "color")}
    assert found["object"].mean().item() == pytest.approx(objects, abs=0.07)
    assert found["color"].mean().item() == pytest.approx(colors, abs=0.07)


def test_other_sizes_are_resampled(drawings):
    judge = load_reward("judge_color")
    large = torch.nn.functional.interpolate(drawings, (128, 128), mode="bilinear")
    assert judge(large, ["A red car and a blue dog."] * 8).mean() > 0.9


def test_bad_input_is_named(drawings):
    judge = load_reward("judge_object")
    with pytest.raises(InvalidShape):
        judge(drawings, ["A red car."])
    with pytest.raises(ValueError, match="grammar"):
        judge(drawings[:1], ["Hello."])

# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from msdda_fast.errors import InvalidShape
from msdda_fast.rewards import REWARDS, load_reward
from msdda_fast.rewards.aesthetic import colourfulness


def test_grey_is_colourless_and_its_gradient_is_finite():
    images = torch.full((2, 3, 8, 8), 0.5, requires_grad=True)
    value = colourfulness(images)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert images.grad.isfinite().all()


def test_the_definition_on_two_flat_halves():
    # left half pure red, right half grey: rg is 255 or 0, yb is 127.5 or 0, so means and
    # deviations are half of these
    images = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64)
    images[..., :2] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).view(3, 1, 1)
    size = (127.5**2 + 63.75**2) ** 0.5
    torch.testing.assert_close(colourfulness(images), torch.tensor([size + 0.3 * size]).double())


def test_it_is_invariant_to_where_the_colours_are():
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    shuffled = images.flatten(2)[..., torch.randperm(256)].view_as(images)
    torch.testing.assert_close(colourfulness(images), colourfulness(shuffled))


def test_its_gradient_is_the_finite_difference():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(colourfulness, (images,))


@pytest.mark.parametrize("name", [*REWARDS, "warmth"])
@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(3, 8, 8), ["A red car."], r"\(3, 8, 8\)"),
        (torch.rand(1, 4, 8, 8), ["A red car."], r"\(1, 4, 8, 8\)"),
        (torch.rand(2, 3, 8, 8), ["A red car."], "2 images and 1 prompts"),
        (torch.rand(2, 3, 8, 8), "A red car.", "2 images and 1 prompts"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["A red car."], "uint8"),
    ],
    ids=["three-axes", "four-channels", "too-few", "one-string", "bytes"],
)
def test_wrong_input_is_named(name, images, prompts, message):
    with pytest.raises(InvalidShape, match=message):
        load_reward(name)(images, prompts)


def test_an_unknown_reward_lists_the_known():
    with pytest.raises(ValueError, match=r"'beauty'.*aesthetic, consistency, warmth, .*clip_score"):
        load_reward("beauty")

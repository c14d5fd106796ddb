# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from msdda_fast.rewards import load_reward
from msdda_fast.rewards.warmth import lab, warm_cool


def flat(*rgb):
    return torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1).expand(-1, -1, 4, 4)


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        # published CIELAB coordinates (D65) of the sRGB primaries
        ((1.0, 0.0, 0.0), (53.24, 80.09, 67.20)),
        ((0.0, 1.0, 0.0), (87.73, -86.18, 83.18)),
        ((0.0, 0.0, 1.0), (32.30, 79.19, -107.86)),
        ((1.0, 1.0, 1.0), (100.0, 0.0, 0.0)),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ],
    ids=["red", "green", "blue", "white", "black"],
)
def test_cielab_of_the_primaries(rgb, expected):
    found = lab(flat(*rgb))[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize("rgb", [(1.0, 0.5, 0.0), (0.2, 0.4, 0.9)], ids=["orange", "blue"])
def test_the_definition_in_chroma_and_hue(rgb):
    _, a, b = lab(flat(*rgb))[0, :, 0, 0].tolist()
    chroma, hue = math.hypot(a, b), math.atan2(b, a)
    wanted = -0.5 + 0.02 * chroma**1.07 * math.cos(hue - math.radians(50))
    assert warm_cool(flat(*rgb)).item() == pytest.approx(wanted, abs=1e-9)


def test_grey_is_half_a_unit_cool_and_its_gradient_is_finite():
    for level in (0.0, 0.5, 1.0):
        image = flat(level, level, level).clone().requires_grad_()
        value = warm_cool(image)
        value.sum().backward()
        assert value.item() == pytest.approx(-0.5, abs=1e-6)
        assert image.grad.isfinite().all()


def test_colours_stand_in_the_order_of_the_observers():
    order = [(1, 0, 0), (1, 0.5, 0), (0.5, 0.5, 0.5), (0, 0.6, 0.6), (0, 0, 1)]
    scores = [warm_cool(flat(*rgb)).item() for rgb in order]
    assert scores == sorted(scores, reverse=True)


def test_where_the_colours_are_does_not_matter():
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    shuffled = images.flatten(2)[..., torch.randperm(256)].view_as(images)
    torch.testing.assert_close(warm_cool(images), warm_cool(shuffled))


def test_its_gradient_is_the_finite_difference():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    images[0, :, 0, 0] *= 0.03  # the linear branches of sRGB and of CIELAB
    assert torch.autograd.gradcheck(warm_cool, (images.requires_grad_(),))


def test_the_reward_is_in_its_units():
    reward = load_reward("warmth")
    assert reward(flat(0.5, 0.5, 0.5), [""]).item() == pytest.approx(-1, abs=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""The shipped model with its two objectives, and with the third beside them."""

import pytest
import torch

import msdda_fast as mf
from msdda_fast.emoji.align import TIMESTEPS

EMOJI = "msdda-fast/emoji"
OPTIONS = {
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "seed": [0, 1],
    "output_type": "latent",
}
PROMPTS = ["A purple colored dog.", "A blue car and a pink sheep."]


@pytest.fixture(scope="module")
def three():
    etas = {"aesthetic": 1.0, "consistency": 0.8, "warmth": 1.0}
    objectives = {
        n: mf.Objective(EMOJI, subfolder=n, eta=eta, timesteps=TIMESTEPS) for n, eta in etas.items()
    }
    pipe = mf.MSDDAPipeline.from_pretrained(EMOJI, objectives=objectives)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_without_asking_there_are_two():
    assert list(mf.MSDDAPipeline.from_pretrained(EMOJI).objectives) == ["aesthetic", "consistency"]


@pytest.mark.full  # weights of 0 are tested on a smaller model
def test_at_a_weight_of_zero_the_third_changes_nothing(three):
    two = mf.MSDDAPipeline.from_pretrained(EMOJI)
    two.set_progress_bar_config(disable=True)
    weights = {"aesthetic": 0.4, "consistency": 0.6}
    wanted = two(PROMPTS, weights=weights, **OPTIONS).images
    found = three(PROMPTS, weights=weights | {"warmth": 0.0}, **OPTIONS).images
    torch.testing.assert_close(found, wanted)


@pytest.mark.full  # pictures; adapters of each objective are in tests/batched
def test_each_of_the_three_has_its_own_picture(three):
    corners = [
        three(PROMPTS, weights={n: float(n == own) for n in three.objectives}, **OPTIONS).images
        for own in three.objectives
    ]
    middle = three(PROMPTS, weights=dict.fromkeys(three.objectives, 1 / 3), **OPTIONS).images
    for image in corners:
        assert (image - middle).abs().mean() > 1e-3

# SPDX-License-Identifier: Apache-2.0
"""SD draws from the base model, whatever is preferred."""

import pytest
import torch

from msdda_fast.methods.model import BASE
from msdda_fast.methods.sd import SD
from tests.gaussian_world import Gaussian, ddim_chain, moments, sd15_scheduler
from tests.methods.gaussian_model import exact_moments

DATA = Gaussian(0.5, 0.25)


@pytest.mark.parametrize("eta", [1.0, 0.8, 0.0])
def test_closed_form(eta):
    expected = moments(ddim_chain(DATA, eta, sd15_scheduler()))
    assert exact_moments(SD(eta=eta), {BASE: DATA}) == pytest.approx(expected, abs=1e-12)


def test_forgetting_eta_is_another_sampler():
    """Stock pipelines default to eta = 0; a port that drops it must not pass."""
    ode = moments(ddim_chain(DATA, 0.0, sd15_scheduler()))
    assert abs(exact_moments(SD(), {BASE: DATA}).var - ode.var) > 0.02


def test_the_preference_plays_no_part_and_costs_are_those_of_one_model(pipe):
    prompts, seeds, steps = ["a dog", "a cat"], [0, 1], 3
    drawn = [
        SD()(pipe, prompts, {"warm": w, "cool": 1 - w}, seeds, num_inference_steps=steps)
        for w in (0.2, 1.0)
    ]
    assert torch.equal(drawn[0].images, drawn[1].images)
    assert drawn[0].cost.unet_forwards == 2 * 2 * steps  # two images, guidance
    assert (drawn[0].cost.decodes, drawn[0].cost.reward_calls) == (2, 0)

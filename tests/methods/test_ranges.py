# SPDX-License-Identifier: Apache-2.0
"""Models made of adapters that act in a range of timesteps act where those do."""

import pytest
import torch

import msdda_fast as mf
from msdda_fast.errors import AdapterMismatch
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.model import BASE
from msdda_fast.methods.morl_oracle import MORLOracle
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.methods.rewarded_soup import RewardedSoup

PROMPTS, SEEDS, STEPS = ["a dog", "a cat"], [3, 4], 5
WEIGHTS = {"warm": 0.3, "cool": 0.7}
HALF = (500, 999)
ACTS = [True, True, False, False, False]  # timesteps 801, 601, 401, 201, 1


def ranged(tiny, warm=HALF, cool=HALF):
    own = {
        "warm": mf.Objective("warm", eta=0.8, timesteps=warm),
        "cool": mf.Objective("cool", eta=0.8, timesteps=cool),
    }
    return mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=own)


def model_of(pipe):
    return PipelineModel(pipe, PROMPTS, WEIGHTS, SEEDS, num_steps=STEPS)


def step_by_step(model, name):
    """Images of one network in the steps where it should act, and of the base's in the others."""
    x = model.initial()
    for k in range(STEPS):
        eps = model.eps(x, k, name if ACTS[k] else BASE)
        x = DDIMStep.of(model.grid, k, 0.8).prev(x, eps, model.noise(k))
    return model.decode(x)


def test_outside_the_base_predicts(tiny):
    with torch.no_grad(), model_of(ranged(tiny)) as model:
        x = model.initial()
        same = [torch.equal(model.eps(x, k, "warm"), model.eps(x, k)) for k in range(STEPS)]
    assert same == [not acts for acts in ACTS]


def test_a_soup_acts_where_its_parts_do(tiny):
    pipe = ranged(tiny)
    drawn = RewardedSoup()(pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=STEPS)
    with torch.no_grad(), model_of(pipe) as model:
        wanted = step_by_step(model, model.soup(WEIGHTS))
    torch.testing.assert_close(drawn.images, wanted, rtol=0, atol=1e-4)
    everywhere = RewardedSoup()(
        ranged(tiny, None, None), PROMPTS, WEIGHTS, SEEDS, num_inference_steps=STEPS
    )
    assert (drawn.images - everywhere.images).abs().max() > 1e-3


def test_an_oracle_acts_where_it_was_trained(tiny):
    pipe = ranged(tiny)
    oracle = MORLOracle(objective="warm", adapters={0.3: tiny.cool}, timesteps=HALF, eta=0.8)
    drawn = oracle(pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=STEPS)
    with torch.no_grad(), model_of(pipe) as model:
        wanted = step_by_step(model, "cool")
    torch.testing.assert_close(drawn.images, wanted, rtol=0, atol=1e-4)


def test_different_ranges_have_no_soup(tiny):
    with model_of(ranged(tiny, cool=(300, 999))) as model:
        with pytest.raises(AdapterMismatch, match="different timesteps"):
            model.soup(WEIGHTS)
        assert model.soup({"warm": 1.0, "cool": 0.0}) == "warm"


@pytest.mark.parametrize(
    ("cool", "networks"), [(HALF, 2 + 2 + 1 + 1 + 1), ((300, 999), 2 + 2 + 2 + 1 + 1)]
)
def test_forwards_are_those_of_the_networks_that_run(tiny, cool, networks):
    pipe = ranged(tiny, cool=cool)
    drawn = MSDDA()(pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=STEPS, guidance_scale=1.0)
    assert drawn.cost.unet_forwards == len(PROMPTS) * networks

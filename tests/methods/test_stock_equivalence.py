# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion in diffusers' loop and in the captured pipeline: systems draw the same."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import msdda_fast as mf
from msdda_fast.methods.db_kla import DBKLA
from msdda_fast.methods.db_mpa import DBMPA
from msdda_fast.methods.db_mpa_ls import DBMPALS
from msdda_fast.methods.deradiff import DeRaDiff
from msdda_fast.methods.morl_oracle import MORLOracle
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.methods.rewarded_soup import RewardedSoup
from msdda_fast.methods.sd import SD
from msdda_fast.methods.stock_model import StockModel
from msdda_fast.pipelines.attach import attach

PROMPTS, SEEDS, STEPS, WEIGHTS = ["a dog", "a cat"], [3, 4], 4, {"warm": 0.3, "cool": 0.7}
SYSTEMS = [
    SD(), SD(eta=0.5), MSDDA(), MSDDA(fusion="eps"), RewardedSoup(), RewardedSoup(remapped=True),
    DBMPA(), DBMPA(remapped=True), DBMPALS(), DBKLA(objective="warm", strength=1.5),
    DeRaDiff(objective="cool", strength=1.3),
]  # fmt: skip


def in_diffusers_loop(pipe):
    """The same networks and adapters in the stock class."""
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    objectives = {
        name: mf.Objective(eta=own.eta, timesteps=own.timesteps)
        for name, own in pipe.objectives.items()
    }
    sets = {name: ((v.adapter, float(v.scale)),) for name, v in pipe.variants.items()}
    return attach(stock, objectives, sets)


def both(method, pipe):
    """Images of a system of either kind of model, from one x_T: diffusers draws its own."""
    settings = dict(num_steps=STEPS, guidance_scale=3.0)
    with torch.no_grad():
        with PipelineModel(pipe, PROMPTS, WEIGHTS, SEEDS, **settings) as model:
            captured, x_T = method.sample(model), model.initial()
        with StockModel(in_diffusers_loop(pipe), PROMPTS, WEIGHTS, SEEDS, **settings) as model:
            model._call["latents"] = x_T
            return method.sample(model), captured


@pytest.mark.parametrize("method", SYSTEMS, ids=repr)
def test_systems_draw_the_same(pipe, method):
    found, wanted = both(method, pipe)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_an_oracle_draws_the_same(pipe, tiny):
    oracle = MORLOracle(objective="warm", adapters={0.3: tiny.warm}, timesteps=(300, 999))
    found, wanted = both(oracle, pipe)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)

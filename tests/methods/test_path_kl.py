# SPDX-License-Identifier: Apache-2.0
"""The KL divergence of a system's path to the base's, against DDIM's steps written out."""

import pytest
import torch

import msdda_fast as mf
from msdda_fast.errors import InvalidSchedule
from msdda_fast.methods import path_kl as module
from msdda_fast.methods.best_of_n import BestOfDraws
from msdda_fast.methods.db_mpa import DBMPA
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.model import BASE
from msdda_fast.methods.morl_oracle import MORLOracle
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.path_kl import has_path_kl, path_kl
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.methods.rewarded_soup import RewardedSoup
from msdda_fast.methods.sd import SD

PROMPTS, SEEDS, STEPS = ["a dog", "a cat"], [3, 4], 5
WEIGHTS = {"warm": 0.3, "cool": 0.7}
HALF = (300, 999)


def measured(method, pipe, weights=WEIGHTS, **options):
    return path_kl(method, pipe, PROMPTS, weights, SEEDS, num_inference_steps=STEPS, **options)


def by_hand(pipe, name, eta):
    """sum_t |on_eps (eps_i - eps_base)|^2 / (2 sigma_t^2) along the path of one model."""
    nats = torch.zeros(len(PROMPTS), dtype=torch.float64)
    with (
        torch.no_grad(),
        PipelineModel(pipe, PROMPTS, {name: 1.0}, SEEDS, num_steps=STEPS) as model,
    ):
        x = model.initial()
        for k in range(STEPS):
            a, p = float(model.grid.alpha_bar_t[k]), float(model.grid.alpha_bar_prev[k])
            sigma = eta * float(model.grid.var[k]) ** 0.5
            on_eps = (1 - p - sigma**2) ** 0.5 - (p * (1 - a) / a) ** 0.5
            eps = model.eps(x, k, name)
            shift = on_eps * (eps - model.eps(x, k, BASE)).double()
            nats += shift.flatten(1).square().sum(1) / (2 * sigma**2)
            x = DDIMStep.of(model.grid, k, eta).prev(x, eps, model.noise(k))
    return nats


@pytest.mark.parametrize("timesteps", [None, HALF])
def test_one_model_alone(tiny, timesteps):
    pipe = mf.MSDDAPipeline.from_pipe(
        tiny.shared(), objectives={"only": mf.Objective("warm", eta=0.8, timesteps=timesteps)}
    )
    found = measured(MSDDA(), pipe, {"only": 1.0})
    torch.testing.assert_close(found, by_hand(pipe, "only", 0.8), rtol=1e-4, atol=0)
    assert (found > 0).all()


def test_the_base_is_at_no_distance(pipe):
    assert measured(SD(), pipe).tolist() == [0.0, 0.0]


def test_its_paths_are_those_of_the_images(pipe, monkeypatch):
    latents = {}

    def kept(method, generate):
        def run(self, *args, **options):
            return latents.setdefault(method, generate(self, *args, **options))

        return run

    monkeypatch.setattr(PipelineModel, "generate", kept("drawn", PipelineModel.generate))
    MSDDA()(pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=STEPS)
    measuring = module._MeasuredModel
    monkeypatch.setattr(measuring, "generate", kept("measured", measuring.generate))
    measured(MSDDA(), pipe)
    torch.testing.assert_close(latents["measured"], latents["drawn"], rtol=0, atol=1e-4)


def test_a_merge_is_nearer_the_base_than_the_ends_of_its_preferences(pipe):
    middle, ends = measured(RewardedSoup(), pipe), measured(MSDDA(), pipe, {"warm": 1.0})
    assert 0 < middle.mean() < ends.mean()


@pytest.mark.parametrize("method", [MSDDA(fusion="eps"), DBMPA(remapped=True)])
def test_equal_steps_have_equal_kl(tiny, method):
    one = mf.Objective("warm", eta=0.8)
    pipe = mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives={"one": one, "other": one})
    weights = {"one": 0.5, "other": 0.5}
    torch.testing.assert_close(
        measured(method, pipe, weights), by_hand(pipe, "one", 0.8), rtol=1e-4, atol=0
    )


def test_systems_that_choose_among_images_have_none(pipe):
    method = BestOfDraws(of=MSDDA(), num_draws=2)
    assert not has_path_kl(method)
    assert has_path_kl(MORLOracle(objective="warm", adapters={}))
    with pytest.raises(ValueError, match="not fused Gaussians"):
        measured(method, pipe)


def test_clipped_steps_are_refused(tiny):
    pipe = mf.MSDDAPipeline.from_pipe(tiny.shared())
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=True)
    with pytest.raises(InvalidSchedule, match="non-Gaussian"):
        measured(MSDDA(), pipe)

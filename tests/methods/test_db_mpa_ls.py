# SPDX-License-Identifier: Apache-2.0
"""DB-MPA-LS: a model drawn for each sample and step."""

from itertools import pairwise

import pytest
import torch

from msdda_fast.methods.db_mpa import DBMPA
from msdda_fast.methods.db_mpa_ls import DBMPALS
from msdda_fast.methods.model import BASE
from msdda_fast.methods.pipeline_model import PipelineModel
from tests.gaussian_world import (
    Gaussian,
    Moments,
    ddim_chain,
    mixed_eps_chain,
    moments,
    responses,
    sd15_scheduler,
)
from tests.methods.gaussian_model import GaussianModel, exact_moments, sampled

EXPERTS = {"warm": Gaussian(1, 0.25), "cool": Gaussian(-1, 0.5)}
W = {"warm": 0.3, "cool": 0.7}
SAMPLES = 200_000


def drawn_moments(experts, weights, num_steps, eta=1.0) -> Moments:
    """Mean and variance of x_0 where each step is one of the experts', by chance."""
    chains = [ddim_chain(expert, eta, sd15_scheduler(), num_steps) for expert in experts]
    mean, var = 0.0, 1.0
    for steps in zip(*chains, strict=True):
        choices = list(zip(weights, steps, strict=True))
        ends = [(w, step.scale * mean + step.shift, step.scale**2 * var) for w, step in choices]
        mean = sum(w * end for w, end, _ in ends)
        var = sum(w * (end**2 + spread) for w, end, spread in ends) - mean**2 + steps[0].var
    return Moments(mean, var)


@pytest.mark.parametrize("num_steps", [8, 50])
def test_closed_form(num_steps):
    """Within five standard errors, which tell it from DB-MPA: that has less variance."""
    x_0 = sampled(DBMPALS(), GaussianModel(EXPERTS, W, batch_size=SAMPLES, num_steps=num_steps))
    mean, var = drawn_moments(list(EXPERTS.values()), list(W.values()), num_steps)
    assert abs(float(x_0.mean()) - mean) < 5 * (var / SAMPLES) ** 0.5
    # the choices make x_0 a mixture; its kurtosis is near that of a Gaussian
    error = 5 * var * (2 / SAMPLES) ** 0.5
    assert abs(float(x_0.var()) - var) < error
    db_mpa = mixed_eps_chain(
        list(EXPERTS.values()), list(W.values()), 1.0, sd15_scheduler(), num_steps
    )
    assert var - moments(db_mpa).var > 2 * error


def test_excess_variance_is_of_order_one_over_t():
    """sum_k G_k^2 w (1 - w) B_k^2 (eps_1 - eps_2)^2, which is exact where slopes are equal."""
    experts, weights = [Gaussian(1, 0.25), Gaussian(-1, 0.25)], [0.3, 0.7]
    scaled = []
    for num_steps in (50, 100, 200):
        chains = [ddim_chain(expert, 1.0, sd15_scheduler(), num_steps) for expert in experts]
        sums = sum(
            gain**2 * 0.3 * 0.7 * (one.shift - two.shift) ** 2
            for (gain, _), one, two in zip(responses(chains[0]), *chains, strict=True)
        )
        mean, var = moments(mixed_eps_chain(experts, weights, 1.0, sd15_scheduler(), num_steps))
        drawn = drawn_moments(experts, weights, num_steps)
        assert drawn == pytest.approx((mean, var + sums), abs=1e-12)
        scaled.append(num_steps * sums)
    for one, two in pairwise(scaled):
        assert two == pytest.approx(one, rel=1e-3)


def test_samples_choose_for_themselves():
    """One choice for the whole batch, as public code makes it, gives all samples one mean."""
    still = torch.zeros(1, 1000, 1, dtype=torch.float64)
    model = GaussianModel(EXPERTS, W, batch_size=1000, num_steps=1, x_T=still[0], z=still)
    values, counts = sampled(DBMPALS(), model).unique(return_counts=True)
    (warm,), (cool,) = (ddim_chain(expert, 1.0, sd15_scheduler(), 1) for expert in EXPERTS.values())
    assert values.tolist() == pytest.approx(sorted([warm.shift, cool.shift]), abs=1e-12)
    share = dict(zip(values.tolist(), counts.tolist(), strict=True))[max(values.tolist())] / 1000
    assert share == pytest.approx(0.3, abs=0.08)  # five standard errors


def test_one_hot_is_the_single_model():
    for w in ({"warm": 1.0, "cool": 0.0}, {"warm": 0.0, "cool": 1.0}):
        expected = exact_moments(DBMPA(eta=0.8), EXPERTS, preference=w)
        assert exact_moments(DBMPALS(eta=0.8), EXPERTS, preference=w) == pytest.approx(expected)


@pytest.mark.full  # on Gaussians above
def test_on_a_pipeline_each_image_goes_its_own_way(pipe):
    """Whatever shares the batch; and as many latents run as with one model."""
    prompts, seeds, weights = ["a dog", "a cat", "a red dog"], [3, 4, 5], {"warm": 0.5, "cool": 0.5}
    run = dict(num_inference_steps=6, guidance_scale=3.0)
    together = DBMPALS()(pipe, prompts, weights, seeds, **run)
    assert together.cost.unet_forwards == 2 * 6 * len(prompts)
    for b, prompt in enumerate(prompts):
        alone = DBMPALS()(pipe, [prompt], weights, [seeds[b]], **run)
        torch.testing.assert_close(alone.images[0], together.images[b], rtol=0, atol=1e-4)


def test_one_hot_on_a_pipeline(pipe):
    weights, settings = {"warm": 0.0, "cool": 1.0}, dict(num_steps=4, guidance_scale=3.0)
    with torch.no_grad(), PipelineModel(pipe, ["a dog"], weights, [0], **settings) as model:
        expected = model.decode(model.generate({"cool": 1.0}, {"cool": 1.0}))
    drawn = DBMPALS()(pipe, ["a dog"], weights, [0], num_inference_steps=4, guidance_scale=3.0)
    torch.testing.assert_close(drawn.images, expected, rtol=0, atol=1e-4)


def test_the_base_can_be_drawn_too():
    models = {BASE: Gaussian(0.5, 0.25), **EXPERTS}
    expected = exact_moments(DBMPA(), models, preference={BASE: 1.0})
    assert exact_moments(DBMPALS(), models, preference={BASE: 1.0}) == pytest.approx(expected)

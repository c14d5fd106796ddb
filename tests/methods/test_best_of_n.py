# SPDX-License-Identifier: Apache-2.0
"""Best-of-N: the maximum of N independent draws."""

import math

import pytest
import torch

import msdda_fast as mf
from msdda_fast.methods import best_of_n
from msdda_fast.methods.best_of_n import BestOfDraws, BestOfN
from msdda_fast.methods.model import BASE
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.particles import replicate
from msdda_fast.methods.sd import SD
from tests.gaussian_world import Gaussian, ddim_chain, moments, responses, sd15_scheduler
from tests.methods.gaussian_model import GaussianModel, sampled
from tests.methods.search_world import (
    INDIFFERENT,
    PROMPTS,
    REWARDS,
    SEEDS,
    WEIGHTS,
    has_mean,
    largest_of,
)

DATA = Gaussian(0.5, 0.25)
N = 8


def model_of(batch_size: int = 20_000, **options) -> GaussianModel:
    rewards = {"high": lambda x: x}
    return GaussianModel(
        {BASE: DATA}, {"high": 1.0}, scalar_rewards=rewards, batch_size=batch_size, **options
    )


def base_moments(eta: float):
    return moments(ddim_chain(DATA, eta, sd15_scheduler()))


def test_order_statistics_of_two_and_three():
    """E max of two normals is 1/sqrt(pi), of three 3/(2 sqrt(pi))."""
    assert largest_of(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-12)
    assert largest_of(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-12)


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
def test_gain_is_the_expected_maximum(eta):
    base = base_moments(eta)
    expected = base.mean + largest_of(N) * math.sqrt(base.var)
    assert has_mean(sampled(BestOfN(num_particles=N, eta=eta), model_of()), expected)


def test_particles_of_one_x_T_are_seen(monkeypatch):
    """Wrong port: one x_T for all. It can choose among what the noise leaves open only."""
    monkeypatch.setattr(
        best_of_n, "initial_particles", lambda model, n: replicate(model.initial(), n)
    )
    found = sampled(BestOfN(num_particles=N, eta=0.5), model_of())
    chain = ddim_chain(DATA, 0.5, sd15_scheduler())
    base, gain_of_x_T = moments(chain), responses(chain)[0][0] * chain[0].scale
    assert not has_mean(found, base.mean + largest_of(N) * math.sqrt(base.var))
    assert has_mean(found, base.mean + largest_of(N) * math.sqrt(base.var - gain_of_x_T**2))


def test_one_winner_for_the_whole_batch_is_seen(monkeypatch):
    """Wrong port: the copy that is best on average, for every sample."""

    def best_for_all(x, scores, batch_size):
        winner = scores.view(-1, batch_size).mean(1).argmax()
        return x.view(-1, batch_size, *x.shape[1:])[winner]

    monkeypatch.setattr(best_of_n, "best", best_for_all)
    base = base_moments(1.0)
    expected = base.mean + largest_of(N) * math.sqrt(base.var)
    assert not has_mean(sampled(BestOfN(num_particles=N), model_of()), expected)


def test_one_particle_is_sd_exactly(pipe):
    drawn, sd = (
        method(pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=3, rewards=REWARDS)
        for method in (BestOfN(num_particles=1), SD())
    )
    assert torch.equal(drawn.images, sd.images)
    assert drawn.cost == sd.cost


def test_the_first_particle_is_sd(pipe):
    """Among equals the first wins."""
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    drawn = BestOfN(num_particles=3)(pipe, PROMPTS, WEIGHTS, SEEDS, rewards=INDIFFERENT, **options)
    expected = SD()(pipe, PROMPTS, WEIGHTS, SEEDS, **options).images
    torch.testing.assert_close(drawn.images, expected, rtol=0, atol=1e-4)


def test_costs(pipe):
    drawn = BestOfN(num_particles=N)(
        pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=3, rewards=REWARDS
    )
    per_image = drawn.cost.unet_forwards / 2, drawn.cost.decodes / 2, drawn.cost.reward_calls / 2
    assert per_image == (2 * N * 3, N, 2 * N)  # guidance; two rewards
    assert drawn.images.shape == (2, 3, 32, 32)


def test_an_image_depends_on_its_own_prompt_and_seed(pipe):
    method, options = BestOfN(num_particles=N), {"num_inference_steps": 3, "rewards": REWARDS}
    together = method(pipe, PROMPTS, WEIGHTS, SEEDS, **options).images
    assert torch.equal(together, method(pipe, PROMPTS, WEIGHTS, SEEDS, **options).images)
    for row in (0, 1):
        alone = method(pipe, PROMPTS[row : row + 1], WEIGHTS, SEEDS[row : row + 1], **options)
        torch.testing.assert_close(together[row], alone.images[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_particles": 0}, ValueError, "num_particles must be a positive integer, got 0"),
        ({"num_particles": 2.0}, ValueError, "got 2.0"),
        ({"eta": 1.5}, mf.errors.InvalidSchedule, "eta must lie in"),
    ],
)
def test_bad_settings_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        BestOfN(**fields)


def test_a_reward_that_is_nan_is_named():
    model = model_of(4)
    model.scalar_rewards = {"high": lambda x: x * float("nan")}
    with pytest.raises(ValueError, match="reward 'high' is NaN for 8 images"):
        sampled(BestOfN(num_particles=2), model)


def test_rewards_are_asked_for(pipe):
    with pytest.raises(ValueError, match="Best-of-N evaluates rewards"):
        BestOfN()(pipe, PROMPTS, WEIGHTS, SEEDS)


def test_the_best_of_draws_of_a_system_gains_the_expected_maximum():
    base = base_moments(1.0)
    expected = base.mean + largest_of(4) * math.sqrt(base.var)
    assert has_mean(sampled(BestOfDraws(of=SD(), num_draws=4), model_of()), expected)


def test_the_first_draw_is_the_system_itself_and_each_one_costs_as_much(pipe):
    options = {"num_inference_steps": 3, "rewards": REWARDS}
    first = MSDDA()(pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=3)
    equal = BestOfDraws(of=MSDDA())(
        pipe, PROMPTS, WEIGHTS, SEEDS, **options | {"rewards": INDIFFERENT}
    )
    assert torch.equal(equal.images, first.images)
    drawn = BestOfDraws(of=MSDDA())(pipe, PROMPTS, WEIGHTS, SEEDS, **options)
    assert drawn.cost.unet_forwards == 2 * first.cost.unet_forwards
    assert drawn.cost.reward_calls == 2 * 2 * len(PROMPTS)  # draws, rewards
    score_of = lambda images: sum(w * REWARDS[n](images, PROMPTS) for n, w in WEIGHTS.items())  # noqa: E731
    assert (score_of(drawn.images) >= score_of(first.images)).all()
    assert not torch.equal(drawn.images, first.images)

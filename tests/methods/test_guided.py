# SPDX-License-Identifier: Apache-2.0
"""What every gradient-guided method does on a pipeline."""

from dataclasses import replace

import pytest
import torch

from msdda_fast.methods.mudm import MUDM
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.methods.rgg import RGG
from msdda_fast.methods.tfg import PRESETS, TFG
from tests.methods.guided_world import TOYS, Contrast, plain

PROMPTS, SEEDS, WEIGHTS = ["a dog", "a cat and a hat"], [3, 4], {"warm": 0.3, "cool": 0.7}
STEPS = 2
METHODS = {
    "rgg": RGG(gamma=1.0),
    "rgg-unet": RGG(jacobian="unet", norm="none", gamma=1.0),
    "tfg": TFG(sigma=0.1, n_samples=2, n_recur=2, n_iter=2),
    "mpgd": PRESETS["mpgd"],
    "mudm": MUDM(n_samples=3, n_recur=2),
    "mudm-dependent": MUDM(n_samples=3, dependency="dependent"),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def draw(method, pipe, prompts=PROMPTS, seeds=SEEDS, weights=WEIGHTS, rewards=TOYS, **settings):
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0} | settings
    return method(pipe, prompts, weights, seeds, rewards=rewards, **settings)


@pytest.mark.sweep(method=1)
@each_method
def test_an_image_depends_on_its_own_prompt_and_seed(method, pipe):
    drawn = draw(method, pipe).images
    assert drawn.shape == (2, 3, 32, 32) and drawn.dtype == torch.float32
    assert torch.equal(draw(method, pipe).images, drawn)
    alone = draw(method, pipe, PROMPTS[1:], SEEDS[1:]).images
    torch.testing.assert_close(alone[0], drawn[1], rtol=0, atol=1e-3)
    networks = [pipe.unet, pipe.vae, pipe.text_encoder]
    assert all(p.grad is None for network in networks for p in network.parameters())


@pytest.mark.parametrize(
    "method",
    [RGG(gamma=0.0), TFG(rho=0.0, mu=0.0), MUDM(scale=0.0), MUDM(interval=(0.5, 0.5))],
    ids=["rgg", "tfg", "mudm", "mudm-interval"],
)
def test_no_guidance_is_the_base_bit_for_bit(method, pipe):
    with torch.no_grad(), model_of(pipe) as model:
        expected = plain(model)
    assert torch.equal(draw(method, pipe).images, expected)


@pytest.mark.parametrize(
    ("method", "unet", "unet_backwards", "decodes"),
    [
        (RGG(), 1, 0, 1),
        (RGG(jacobian="unet"), 1, 2, 1),
        (RGG(jacobian="unet", norm="none"), 1, 1, 1),
        (TFG(n_samples=4, n_iter=2, n_recur=2), 2, 2, 2 * 4 * (1 + 2)),
        (TFG(rho=0.0, n_samples=4), 1, 0, 4),
        (TFG(mu=0.0, n_samples=4), 1, 1, 4),
        (PRESETS["mpgd"], 1, 0, 1),
        (MUDM(n_samples=5, n_recur=2), 2, 2, 2 * 5),
    ],
    ids=repr,
)
def test_cost_of_a_step(method, unet, unet_backwards, decodes, pipe, calls):
    """Per image; guidance makes two latents of each, forwards and backwards."""
    cost = draw(method, pipe).cost
    images, branches, rewards = len(PROMPTS), 2, len(TOYS)
    assert cost.unet_forwards == images * branches * STEPS * unet
    assert cost.unet_forwards == images * branches * len(calls)
    assert cost.unet_backwards == images * branches * STEPS * unet_backwards
    assert cost.decodes == images * (STEPS * decodes + 1)
    assert cost.reward_calls == images * rewards * STEPS * decodes


class Opaque(Contrast):
    differentiable = False


@each_method
def test_a_reward_without_gradient_is_refused_before_any_work(method, pipe, calls):
    with pytest.raises(ValueError, match=f"{method.name} follows .* reward 'cool' has none"):
        draw(method, pipe, rewards={**TOYS, "cool": Opaque()})
    assert calls == []


def test_a_reward_of_weight_0_needs_no_gradient(pipe):
    weights = {"warm": 1.0, "cool": 0.0}
    drawn = draw(RGG(), pipe, weights=weights, rewards={**TOYS, "cool": Opaque()})
    assert drawn.cost.reward_calls == len(PROMPTS) * STEPS


def test_missing_rewards_are_named(pipe, calls):
    with pytest.raises(
        ValueError, match=r"RGG evaluates rewards, and none is given for \['cool'\]"
    ):
        draw(RGG(), pipe, rewards={"warm": TOYS["warm"]})
    assert calls == []


@pytest.mark.parametrize("name", ["n_samples", "n_iter", "n_recur"])
def test_counts_start_at_1(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        replace(PRESETS["lgd"], **{name: 0})


def model_of(pipe) -> PipelineModel:
    return PipelineModel(
        pipe, PROMPTS, WEIGHTS, SEEDS, num_steps=STEPS, guidance_scale=3.0, rewards=TOYS
    )

# SPDX-License-Identifier: Apache-2.0
"""CoDe: the gain of choosing, block by block."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast.methods.code import CoDe
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.model import BASE
from msdda_fast.methods.particles import best, replicate, score
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

DATA = Gaussian(0, 0.25)
N, STEPS = 20, 50


def model_of(batch_size: int = 4_000, reward=lambda x: x, **options) -> GaussianModel:
    return GaussianModel(
        {BASE: DATA}, {"r": 1.0}, scalar_rewards={"r": reward}, batch_size=batch_size, **options
    )


def chain_of(num_steps: int = STEPS):
    return ddim_chain(DATA, 1.0, sd15_scheduler(), num_steps)


def winner(model: GaussianModel, x: Tensor, k: int) -> Tensor:
    """Of latents x (N, B) after step k, those whose E[x_0 | x] has the highest reward, (B,)."""
    if k < STEPS - 1:
        a = float(model.grid.alpha_bar_prev[k])
        slope = math.sqrt(a) * DATA.var / (a * DATA.var + 1 - a)
        promised = DATA.mean + slope * (x - math.sqrt(a) * DATA.mean)
    else:
        promised = x
    return x.gather(0, model.scalar_rewards["r"](promised).argmax(0, keepdim=True))[0]


def one_step_path(model: GaussianModel, chosen) -> Tensor:
    """x_0 (B,) with a choice among N candidates in each step of `chosen`."""
    x = model.initial()[:, 0]
    for k, step in enumerate(chain_of()):
        z = model.noise(k, N).view(N, -1)
        candidates = step.scale * x + step.shift + math.sqrt(step.var) * z
        x = winner(model, candidates, k) if k in chosen else candidates[0]
    return x


def block_path(model: GaussianModel, ends) -> Tensor:
    """x_0 (B,) of N particles, of which one is kept after each step of `ends`."""
    x = model.initial()[:, 0].expand(N, -1)
    for k, step in enumerate(chain_of()):
        x = step.scale * x + step.shift + math.sqrt(step.var) * model.noise(k, N).view_as(x)
        if k in ends:
            x = winner(model, x, k).expand(N, -1)
    return x[0]


def one_step_gain(block: int) -> float:
    """e_N sum_k G_k sigma_k over the steps of choice, with E[x_0 | x after step k] = G_k x."""
    chain = chain_of()
    gains = [gain for gain, _ in responses(chain)]
    chosen = range(0, STEPS - 1, block)
    return largest_of(N) * sum(gains[k] * math.sqrt(chain[k].var) for k in chosen)


def block_gains(block: int) -> list[float]:
    """e_N G sd of each block: sd that of its end given its start, G what of it reaches x_0."""
    chain = chain_of()
    gains = [gain for gain, _ in responses(chain)]
    found = []
    for start in range(0, STEPS, block):
        stop, var = min(start + block, STEPS), 0.0
        for step in chain[start:stop]:
            var = step.scale**2 * var + step.var
        found.append(largest_of(N) * gains[stop - 1] * math.sqrt(var))
    return found


class SharedNoise(GaussianModel):
    """Wrong port: candidates with one z."""

    def noise(self, k, particles=1, *, purpose=0):
        return replicate(super().noise(k, purpose=purpose), particles)


class Misjudging(CoDe):
    """Wrong ports of what a candidate is judged by."""

    def _choose(self, model, x, k):
        scores = score(model, model.decode(self.outlook(model, x, k)))
        return best(x, scores, model.batch_size), None


class LateTimestep(Misjudging):
    def outlook(self, model, x, k):  # the noise prediction of the step that led here
        return DDIMStep.of(model.grid, k, self.eta).x0(x, model.eps(x, k - 1))


class Noisy(Misjudging):
    def outlook(self, model, x, k):  # no prediction at all
        return x


@pytest.mark.parametrize("block", [1, 5, 7, STEPS])
@pytest.mark.parametrize("reuse", [True, False])
def test_one_step_chooses_at_block_starts_but_never_at_the_last_step(block, reuse):
    model = model_of(batch_size=50)
    found = sampled(CoDe(variant="one-step", num_particles=N, block=block, reuse=reuse), model)
    expected = one_step_path(model, range(0, STEPS - 1, block))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if block in (1, 7):  # 49 is one of 0, 7, 14, ...
        wrong = one_step_path(model, range(0, STEPS, block))
        assert (found - wrong).abs().max() > 0.01


@pytest.mark.parametrize("block", [1, 5, 7, STEPS])  # 7: the last block is of one step
@pytest.mark.parametrize("reuse", [True, False])
def test_official_chooses_at_block_ends_and_after_the_last_step(block, reuse):
    model = model_of(batch_size=50)
    found = sampled(CoDe(num_particles=N, block=block, reuse=reuse), model)
    before = set(range(block - 1, STEPS - 1, block))
    expected = block_path(model, before | {STEPS - 1})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - block_path(model, before)).abs().max() > 0.01


@pytest.mark.parametrize("variant", ["official", "one-step"])
def test_gain_in_closed_form(variant):
    expected = one_step_gain(5) if variant == "one-step" else sum(block_gains(5))
    assert has_mean(sampled(CoDe(variant=variant, num_particles=N), model_of()), expected)


def test_one_block_is_best_of_n_with_one_x_T():
    chain = chain_of()
    of_x_T = responses(chain)[0][0] * chain[0].scale
    expected = largest_of(N) * math.sqrt(moments(chain).var - of_x_T**2)
    assert block_gains(STEPS) == pytest.approx([expected], abs=1e-12)
    assert has_mean(sampled(CoDe(num_particles=N, block=STEPS), model_of()), expected)


def test_the_variants_are_not_one():
    """What a comparison loses by taking one for the other."""
    assert one_step_gain(5) < 0.5 * sum(block_gains(5))


@pytest.mark.parametrize("variant", ["official", "one-step"])
def test_candidates_that_share_their_noise_are_seen(variant):
    model = SharedNoise({BASE: DATA}, {"r": 1.0}, scalar_rewards={"r": lambda x: x}, batch_size=999)
    found = sampled(CoDe(variant=variant, num_particles=N), model)
    expected = one_step_gain(5) if variant == "one-step" else sum(block_gains(5))
    assert not has_mean(found, expected)
    assert has_mean(found, 0.0)


@pytest.mark.parametrize("variant", ["official", "one-step"])
def test_candidates_are_judged_by_their_look_ahead(variant):
    """A reward for an x_0 near 0.3 tells x0hat from what else could be judged."""
    model = model_of(batch_size=50, reward=lambda x: -(x - 0.3).square())
    if variant == "official":
        expected = block_path(model, range(4, STEPS, 5))
    else:
        expected = one_step_path(model, range(0, STEPS - 1, 5))
    settings = {"variant": variant, "num_particles": N}
    torch.testing.assert_close(sampled(CoDe(**settings), model), expected, rtol=0, atol=1e-12)
    for wrong in (LateTimestep, Noisy):
        assert (sampled(wrong(**settings), model) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("method", "evaluations", "decodes", "scores"),
    [
        (CoDe(), 1 + N * (STEPS - 1), 10 * N, 10 * N),
        (CoDe(reuse=False), 1180, 200, 200),
        (CoDe(variant="one-step"), STEPS + (N - 1) * 10, 10 * N + 1, 10 * N),
        (CoDe(variant="one-step", reuse=False), 250, 201, 200),
        (CoDe(block=7, reuse=False), N * STEPS + N * 7, 8 * N, 8 * N),
        (CoDe(variant="one-step", block=7, reuse=False), STEPS + 7 * N, 7 * N + 1, 7 * N),
    ],
)
def test_costs(method, evaluations, decodes, scores):
    model = model_of(batch_size=3)
    sampled(method, model)
    cost = model.cost
    assert (cost.unet_forwards, cost.decodes, cost.reward_calls) == (
        3 * evaluations,
        3 * decodes,
        3 * scores,
    )


SMALL = [CoDe(num_particles=3, block=2), CoDe(variant="one-step", num_particles=3, block=2)]
BY_VARIANT = pytest.mark.parametrize("method", SMALL, ids=lambda method: method.variant)
OPTIONS = {"num_inference_steps": 5, "guidance_scale": 3.0}


@pytest.mark.parametrize(
    ("method", "evaluations", "decodes", "scores"),
    [
        (replace(SMALL[0], reuse=False), 3 * 5 + 3 * 2, 3 * 3, 3 * 3),
        (replace(SMALL[1], reuse=False), 5 + 3 * 2, 3 * 2 + 1, 3 * 2),
    ],
)
def test_costs_with_guidance_and_two_rewards(pipe, method, evaluations, decodes, scores):
    drawn = method(pipe, PROMPTS, WEIGHTS, SEEDS, rewards=REWARDS, **OPTIONS)
    cost = drawn.cost
    assert (cost.unet_forwards, cost.decodes, cost.reward_calls) == (
        2 * 2 * evaluations,
        2 * decodes,
        2 * 2 * scores,
    )
    assert cost.unet_backwards == 0
    assert drawn.images.shape == (2, 3, 32, 32)


@BY_VARIANT
def test_equal_latents_are_evaluated_once_for_the_same_images(pipe, method):
    drawn, published = (
        m(pipe, PROMPTS, WEIGHTS, SEEDS, rewards=REWARDS, **OPTIONS)
        for m in (method, replace(method, reuse=False))
    )
    torch.testing.assert_close(drawn.images, published.images, rtol=0, atol=1e-4)
    assert drawn.cost.unet_forwards < published.cost.unet_forwards


@pytest.mark.sweep(method=1)
@BY_VARIANT
def test_an_image_depends_on_its_own_prompt_and_seed(pipe, method):
    options = OPTIONS | {"rewards": REWARDS}
    together = method(pipe, PROMPTS, WEIGHTS, SEEDS, **options).images
    assert torch.equal(together, method(pipe, PROMPTS, WEIGHTS, SEEDS, **options).images)
    for row in (0, 1):
        alone = method(pipe, PROMPTS[row : row + 1], WEIGHTS, SEEDS[row : row + 1], **options)
        torch.testing.assert_close(together[row], alone.images[0], rtol=0, atol=1e-4)


@BY_VARIANT
def test_one_particle_is_sd_exactly(pipe, method):
    expected = SD()(pipe, PROMPTS, WEIGHTS, SEEDS, **OPTIONS)
    drawn = replace(method, num_particles=1)(
        pipe, PROMPTS, WEIGHTS, SEEDS, rewards=REWARDS, **OPTIONS
    )
    assert torch.equal(drawn.images, expected.images)
    assert drawn.cost == expected.cost


@BY_VARIANT
def test_the_first_candidate_is_sd(pipe, method):
    """Among equals the first wins."""
    expected = SD()(pipe, PROMPTS, WEIGHTS, SEEDS, **OPTIONS).images
    drawn = method(pipe, PROMPTS, WEIGHTS, SEEDS, rewards=INDIFFERENT, **OPTIONS)
    torch.testing.assert_close(drawn.images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"eta": 0.0}, mf.errors.InvalidSchedule, "eta is 0, at which all candidates are equal"),
        ({"eta": -0.1}, mf.errors.InvalidSchedule, "eta must lie in"),
        ({"variant": "db2025"}, ValueError, "variant is 'db2025', expected official or one-step"),
        ({"num_particles": 0}, ValueError, "num_particles must be a positive integer"),
        ({"block": 0}, ValueError, "block must be a positive integer"),
    ],
)
def test_bad_settings_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        CoDe(**fields)

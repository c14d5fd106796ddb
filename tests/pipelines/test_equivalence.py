# SPDX-License-Identifier: Apache-2.0
"""The pipeline against stock diffusers (M = 1) and against the paper's Algorithm 1 (M = 2)."""

import pytest
import torch

import msdda_fast as mf
from msdda_fast.reference import algorithm_1, ddim_posterior, guide

PROMPTS = ["a red dog", "a blue cat"]
STEPS = 4


def trajectory(pipe, *args, **kwargs) -> torch.Tensor:
    """Latents after every step, (T, B, C, h, w)."""
    seen = []

    def keep(_, k, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    pipe(*args, output_type="latent", callback_on_step_end=keep, **kwargs)
    return torch.stack(seen)


def in_float64(pipe):
    """Let the scheduler compute its coefficients in float64, as our tables are."""
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler.final_alpha_cumprod = pipe.scheduler.final_alpha_cumprod.double()
    return pipe


def relative_error(actual, expected) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# A step rounds some 8 values; predicting x_0 amplifies that by up to 1 / sqrt(alpha_bar_981) = 13.
ROUNDINGS = 13 * 8


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("adapter", ["warm", None])
def test_one_objective_is_stock_diffusers_at_every_step(tiny, dtype, guidance, adapter):
    ours = in_float64(tiny.only(mf.Objective(adapter), dtype))
    stock = in_float64(tiny.stock(adapter, dtype))
    request = dict(num_inference_steps=STEPS, guidance_scale=guidance, num_images_per_prompt=2)
    actual = trajectory(ours, PROMPTS, generator=torch.manual_seed(3), **request)
    expected = trajectory(stock, PROMPTS, generator=torch.manual_seed(3), eta=1.0, **request)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < ROUNDINGS * torch.finfo(dtype).eps


def test_deterministic_and_partly_stochastic_etas_are_stock_diffusers_too(tiny):
    stock = in_float64(tiny.stock("cool", torch.float64))
    for eta in (0.0, 0.6):
        ours = tiny.only(mf.Objective("cool", eta=eta), torch.float64)
        request = dict(num_inference_steps=STEPS, guidance_scale=2.0)
        actual = trajectory(in_float64(ours), PROMPTS, generator=torch.manual_seed(3), **request)
        expected = trajectory(stock, PROMPTS, generator=torch.manual_seed(3), eta=eta, **request)
        assert relative_error(actual, expected) < ROUNDINGS * torch.finfo(torch.float64).eps


def test_one_generator_per_image_is_stock_diffusers(tiny):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    ours, stock = tiny.only(mf.Objective("warm")), tiny.stock("warm")
    request = dict(num_inference_steps=STEPS, guidance_scale=3.0)
    actual = trajectory(ours, PROMPTS, generator=generators(), **request)
    expected = trajectory(stock, PROMPTS, generator=generators(), eta=1.0, **request)
    assert relative_error(actual, expected) < ROUNDINGS * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", ["tiny", "tiny_kl"])
def test_images_are_those_of_stock_diffusers(request, kind):
    model = request.getfixturevalue(kind)
    ours, stock = model.only(mf.Objective("warm")), model.stock("warm")
    call = dict(num_inference_steps=STEPS, guidance_scale=3.0, output_type="np")
    actual = ours(PROMPTS, generator=torch.manual_seed(3), **call).images
    expected = stock(PROMPTS, generator=torch.manual_seed(3), eta=1.0, **call).images
    assert actual.shape == expected.shape == (2, 32, 32, 3)
    # less than half a level of an 8-bit image
    assert abs(actual - expected).max() < 0.5 / 255


def posterior(stock, eta, guidance, negative_prompt):
    """p_i(x_{t-1} | x_t) of a stock UNet, by the reference's formulas."""
    scheduler = stock.scheduler
    scheduler.set_timesteps(STEPS)
    stride = scheduler.config.num_train_timesteps // STEPS
    cond, uncond = stock.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt)

    @torch.no_grad()
    def moments(x, k):
        t = int(scheduler.timesteps[k])
        u, c = (stock.unet(x, t, encoder_hidden_states=e).sample for e in (uncond, cond))
        bars = scheduler.alphas_cumprod
        bar_prev = bars[t - stride] if t >= stride else scheduler.final_alpha_cumprod
        return ddim_posterior(x, guide(u, c, guidance), bars[t].double(), bar_prev.double(), eta)

    return moments


def test_two_objectives_are_algorithm_1_over_two_stock_unets(tiny):
    seeds, shape = [11, 12], (2, 4, 8, 8)
    x_T = mf.counter_noise(seeds, shape, stream=0, dtype=torch.float64)
    noise = torch.stack(
        [mf.counter_noise(seeds, shape, step=k, dtype=torch.float64) for k in range(STEPS)]
    )
    weights = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64)  # per prompt
    negative = ["blurry", "a cat"]
    posteriors = [
        posterior(tiny.stock("warm", torch.float64), 1.0, 3.0, negative),
        posterior(tiny.stock("cool", torch.float64), 0.8, 1.5, negative),
    ]
    expected = algorithm_1(posteriors, weights.T, x_T, noise)
    actual = tiny.shared(torch.float64)(
        PROMPTS,
        num_inference_steps=STEPS,
        weights=weights,
        guidance_scale={"warm": 3.0, "cool": 1.5},
        negative_prompt=negative,
        seed=seeds,
        output_type="latent",
    ).images
    assert relative_error(actual, expected) < ROUNDINGS * torch.finfo(torch.float64).eps

# SPDX-License-Identifier: Apache-2.0
"""What every method stands on: one seam to the networks, one noise, one account of the cost."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import msdda_fast as mf
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.model import BASE
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.methods.sd import SD

PROMPTS = ["a dog", "a cat and a hat", "a dog"]
SEEDS = [3, 4, 5]
WEIGHTS = {"warm": 0.3, "cool": 0.7}
STEPS = 4


def model_of(pipe, prompts=PROMPTS, seeds=SEEDS, weights=WEIGHTS, **options) -> PipelineModel:
    options = {"num_steps": STEPS, "guidance_scale": 3.0} | options
    return PipelineModel(pipe, prompts, weights, seeds, **options)


def test_msdda_is_the_pipeline(pipe):
    drawn = MSDDA()(pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=STEPS, guidance_scale=3.0)
    expected = pipe(
        PROMPTS, weights=WEIGHTS, seed=SEEDS, num_inference_steps=STEPS, guidance_scale=3.0,
        output_type="pt",
    ).images  # fmt: skip
    assert torch.equal(drawn.images, expected)


def test_own_etas_can_be_replaced(pipe):
    etas = {"warm": 0.5, "cool": 1.0}
    drawn = MSDDA(etas=etas)(pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=STEPS)
    expected = pipe(
        PROMPTS, weights=WEIGHTS, seed=SEEDS, num_inference_steps=STEPS, etas=etas, output_type="pt"
    ).images
    assert torch.equal(drawn.images, expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sd_step_by_step_is_the_base_in_one_call(pipe, guidance_scale):
    """The parts that search and guidance methods use make up the sampler they are compared with."""
    drawn = SD()(
        pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=STEPS, guidance_scale=guidance_scale
    )
    with torch.no_grad(), model_of(pipe, guidance_scale=guidance_scale) as model:
        x = model.initial()
        for k in range(STEPS):
            x = DDIMStep.of(model.grid, k, 1.0).prev(x, model.eps(x, k), model.noise(k))
        images = model.decode(x)
    torch.testing.assert_close(drawn.images, images, rtol=0, atol=1e-4)
    assert drawn.cost == model.cost
    assert model.cost.unet_forwards == len(PROMPTS) * STEPS * (1 if guidance_scale == 1.0 else 2)


def test_aligned_models_step_by_step_are_the_single_objective(pipe):
    with torch.no_grad(), model_of(pipe) as model:
        x = model.initial()
        for k in range(STEPS):
            x = DDIMStep.of(model.grid, k, 0.8).prev(x, model.eps(x, k, "cool"), model.noise(k))
        expected = model.generate({"warm": 0.0, "cool": 1.0}, model.etas)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


def test_rows_say_which_prompt_a_latent_belongs_to(pipe):
    rows = torch.tensor([2, 1, 1, 0])
    with torch.no_grad(), model_of(pipe) as model:
        x = model.noise(0, 2)[: len(rows)]
        together = model.eps(x, 1, rows=rows)
        for latent, row, output in zip(x, rows.tolist(), together, strict=True):
            with model_of(pipe, [PROMPTS[row]], [0]) as alone:
                expected = alone.eps(latent[None], 1)[0]
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


def test_an_image_depends_on_its_own_prompt_and_seed(pipe):
    with model_of(pipe) as model, model_of(pipe, PROMPTS[1:], SEEDS[1:]) as fewer:
        assert torch.equal(model.initial()[1:], fewer.initial())
        for purpose in (0, 3):
            ours = model.noise(2, 3, purpose=purpose).unflatten(0, (3, 3))
            assert torch.equal(ours[:, 1:], fewer.noise(2, 3, purpose=purpose).unflatten(0, (3, 2)))
        assert torch.equal(model.uniform(1, purpose=4)[1:], fewer.uniform(1, purpose=4))


def test_no_two_draws_are_the_same(pipe):
    with model_of(pipe) as model:
        draws = [
            model.initial(),
            *model.noise(0, 3).chunk(3),
            *model.noise(1, 3).chunk(3),
            *model.noise(0, 3, purpose=1).chunk(3),
        ]
    rows = torch.cat(draws).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_first_copy_has_the_noise_of_every_sampler(pipe):
    with model_of(pipe) as model:
        assert torch.equal(model.noise(2, 4)[: len(PROMPTS)], model.noise(2))


def test_gradients_flow_to_latents_and_are_counted(pipe):
    with model_of(pipe, guidance_scale=3.0) as model:
        x = model.initial().requires_grad_()
        images = model.decode(DDIMStep.of(model.grid, 1, 1.0).x0(x, model.eps(x, 1)))
        (gradient,) = torch.autograd.grad(images.mean(), x)
    assert gradient.abs().sum() > 0
    assert model.cost.unet_backwards == model.cost.unet_forwards == 2 * len(PROMPTS)


def test_images_are_scored_in_8_bits_and_gradients_in_full(pipe):
    seen = []

    class Mean:
        name, differentiable = "warm", True

        def __call__(self, images, prompts):
            seen.append((images, list(prompts)))
            return images.mean((1, 2, 3))

    class Never(Mean):
        def __call__(self, images, prompts):
            raise AssertionError("a reward of weight 0 is not evaluated")

    rewards = {"warm": Mean(), "cool": Never()}
    with model_of(pipe, weights={"warm": 1.0, "cool": 0.0}, rewards=rewards) as model:
        images = torch.rand(4, 3, 8, 8)
        assert list(model.rewards(images)) == ["warm"]
        model.rewards(images.requires_grad_())
    assert torch.equal(seen[0][0], (255 * images.detach()).round() / 255)
    assert torch.equal(seen[1][0], images)
    assert seen[0][1] == [*PROMPTS, PROMPTS[0]]
    assert model.cost.reward_calls == 8


def test_a_pipeline_stays_as_it_was(pipe):
    layers = [m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer)]
    before = [(list(m.active_adapters), m.disable_adapters) for m in layers]
    SD()(pipe, PROMPTS, WEIGHTS, SEEDS, num_inference_steps=1)
    with model_of(pipe) as model:
        model.eps(model.initial(), 0, "cool")
    assert [(list(m.active_adapters), m.disable_adapters) for m in layers] == before
    assert list(pipe.objectives) == ["warm", "cool"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": {"warm": 0.5, "cold": 0.5}}, mf.errors.UnknownObjective, "'cold'"),
        ({"weights": {"warm": 0.5, "cool": 0.6}}, mf.errors.InvalidWeights, "sum to 1.1"),
        ({"seeds": [1, 2]}, mf.errors.InvalidShape, "2 seeds for 3 images"),
        ({"num_inference_steps": 0}, mf.errors.InvalidSchedule, "num_steps is 0"),
        ({"guidance_scale": 0.5}, mf.errors.InvalidSchedule, "guidance_scale"),
    ],
)
def test_bad_input_is_named_before_any_work(pipe, calls, change, error, message):
    arguments = {
        "prompts": PROMPTS, "weights": WEIGHTS, "seeds": SEEDS, "num_inference_steps": STEPS
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        MSDDA()(pipe, **arguments)
    assert calls == []


def test_base_is_always_there(pipe):
    with torch.no_grad(), model_of(pipe) as model:
        both = model.generate({BASE: 0.5, "cool": 0.5}, {BASE: 1.0, "cool": 0.8})
        only = model.generate({BASE: 1.0}, {BASE: 1.0})
    assert model.cost.unet_forwards == 3 * len(PROMPTS) * STEPS * 2
    assert not torch.allclose(both, only)

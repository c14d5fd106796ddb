# SPDX-License-Identifier: Apache-2.0
"""What a call evaluates, what an image depends on, and what comes out."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DConditionModel

import msdda_fast as mf
from tests.tiny_model import quiet, small_unet

PROMPTS = ["a red dog", "a blue cat"]
SHORT = dict(num_inference_steps=2, guidance_scale=3.0, seed=0, output_type="latent")


def close(actual, expected, tolerance=1e-5):
    """Equal up to float32 rounding: another batch size may sum in another order."""
    return (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture
def one_by_one(tiny) -> mf.MSDDAPipeline:
    """Runs stock forwards, which can be counted."""
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
    pipe.set_forward("sequential")
    return pipe


class TestWhatIsEvaluated:
    def test_each_objective_runs_once_a_step_with_its_own_adapter(self, one_by_one, calls):
        one_by_one(PROMPTS, **SHORT)
        assert calls == [("warm",), ("cool",)] * 2

    @pytest.mark.parametrize("one_hot, name", [((1, 0), "warm"), ((0, 1), "cool")])
    def test_weight_zero_is_never_evaluated(self, one_by_one, calls, one_hot, name):
        one_by_one(PROMPTS, weights=one_hot, **SHORT)
        assert calls == [(name,)] * 2

    def test_weight_zero_for_some_prompts_only_is_evaluated(self, one_by_one, calls):
        one_by_one(PROMPTS, weights=[{"warm": 1, "cool": 0}, {"warm": 0.5, "cool": 0.5}], **SHORT)
        assert calls == [("warm",), ("cool",)] * 2

    def test_a_schedule_evaluates_what_each_step_needs(self, one_by_one, calls):
        one_by_one(PROMPTS, weights=lambda k: (1, 0) if k == 0 else (0, 1), **SHORT)
        assert calls == [("warm",), ("cool",)]

    def test_the_base_model_runs_without_adapters(self, tiny, calls):
        objectives = {"warm": mf.Objective(), "cool": mf.Objective(), "plain": mf.Objective.base()}
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=objectives))
        pipe.set_forward("sequential")
        pipe(PROMPTS, weights={"warm": 0, "cool": 0, "plain": 1}, **SHORT)
        assert calls == [()] * 2

    def test_a_network_of_its_own_runs_in_place_of_the_base(self, tiny, monkeypatch):
        own = small_unet()
        objectives = {"warm": mf.Objective(), "cool": mf.Objective(), "own": mf.Objective(unet=own)}
        pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=objectives))
        pipe.set_forward("sequential")
        ran, forward = [], UNet2DConditionModel.forward

        def note(network, *args, **kwargs):
            ran.append(network)
            return forward(network, *args, **kwargs)

        monkeypatch.setattr(UNet2DConditionModel, "forward", note)
        pipe(PROMPTS, weights={"warm": 0.5, "cool": 0, "own": 0.5}, **SHORT)
        assert ran == [pipe.unet, own] * 2

    @pytest.mark.parametrize("guidance, rows", [(1.0, 2), (3.0, 4), ({"warm": 1, "cool": 2}, 4)])
    def test_the_unconditional_half_runs_only_under_guidance(
        self, one_by_one, monkeypatch, guidance, rows
    ):
        seen, forward = [], UNet2DConditionModel.forward

        def note(network, sample, *args, **kwargs):
            seen.append(len(sample))
            return forward(network, sample, *args, **kwargs)

        monkeypatch.setattr(UNet2DConditionModel, "forward", note)
        one_by_one(PROMPTS, **{**SHORT, "guidance_scale": guidance})
        assert seen == [rows] * 4

    def test_scale_zero_is_the_base_and_scale_one_is_not(self, tiny):
        def run(objective):
            return tiny.only(objective)(PROMPTS, **SHORT).images

        base = run(mf.Objective.base())
        assert close(run(mf.Objective("warm", scale=0.0)), base)
        assert not close(run(mf.Objective("warm")), base, 1e-2)


class TestWhatAnImageDependsOn:
    def test_not_on_what_shares_its_batch(self, pipe):
        weights = [{"warm": 0.3, "cool": 0.7}, {"warm": 0.9, "cool": 0.1}]
        options = {key: SHORT[key] for key in SHORT if key != "seed"}
        together = pipe(PROMPTS, weights=weights, seed=[4, 9], **options).images
        for i in range(2):
            alone = pipe(PROMPTS[i], weights=weights[i], seed=[4, 9][i], **options).images
            assert close(together[i : i + 1], alone)

    def test_seed_counts_up_over_images(self, pipe):
        counted = pipe(PROMPTS, **{**SHORT, "seed": 7}).images
        listed = pipe(PROMPTS, **{**SHORT, "seed": [7, 8]}).images
        assert torch.equal(counted, listed)

    def test_on_its_seed_prompt_and_weights(self, pipe):
        base = pipe("a red dog", weights=(0.5, 0.5), **SHORT).images
        other = {
            "seed": pipe("a red dog", weights=(0.5, 0.5), **{**SHORT, "seed": 1}).images,
            "prompt": pipe("a blue cat", weights=(0.5, 0.5), **SHORT).images,
            "weights": pipe("a red dog", weights=(0.9, 0.1), **SHORT).images,
            "etas": pipe("a red dog", weights=(0.5, 0.5), etas={"cool": 0.1}, **SHORT).images,
        }
        for name, images in other.items():
            assert not close(images, base, 1e-2), name

    def test_latents_replace_the_first_noise_only(self, pipe):
        x_T = mf.counter_noise([0], (1, 4, 8, 8), stream=0)
        drawn = pipe("a red dog", **SHORT).images
        assert torch.equal(pipe("a red dog", latents=x_T, **SHORT).images, drawn)
        assert not close(pipe("a red dog", latents=x_T + 1, **SHORT).images, drawn, 1e-2)

    def test_weights_by_name_prompt_image_and_step_agree(self, pipe):
        names = {"warm": 0.25, "cool": 0.75}
        rows = torch.tensor([[0.25, 0.75]] * 4)
        forms = [names, [names, names], (0.25, 0.75), rows, lambda k: [names, names]]
        request = dict(num_images_per_prompt=2, **SHORT)
        first, *others = (pipe(PROMPTS, weights=form, **request).images for form in forms)
        for images in others:
            assert torch.equal(images, first)

    def test_a_list_of_weights_holds_one_row_per_prompt(self, pipe):
        rows = [{"warm": 1, "cool": 0}, {"warm": 0, "cool": 1}]
        both = pipe(PROMPTS, weights=rows, num_images_per_prompt=2, **SHORT).images
        warm = pipe(PROMPTS, weights=rows[0], num_images_per_prompt=2, **SHORT).images
        assert close(both[:2], warm[:2]) and not close(both[2:], warm[2:], 1e-2)

    def test_zero_variance_policies(self, pipe):
        request = dict(SHORT, etas={"warm": 0.0, "cool": 1.0})
        with pytest.raises(mf.ZeroVariance):
            pipe(PROMPTS, **request)
        dominated = pipe(PROMPTS, zero_variance="dominate", **request).images
        assert close(dominated, pipe(PROMPTS, weights=(1, 0), **request).images)

    def test_negative_weights_extrapolate_on_request(self, pipe):
        with pytest.raises(mf.InvalidWeights):
            pipe(PROMPTS, weights=(-0.2, 1.2), **SHORT)
        pipe(PROMPTS, weights=(-0.2, 1.2), extrapolate=True, **SHORT)

    def test_the_negative_prompt_and_embeddings_mean_what_they_say(self, pipe):
        cond, uncond = pipe.encode_prompt(PROMPTS, "cpu", 1, True, ["blurry", "blurry"])
        text = pipe(PROMPTS, negative_prompt="blurry", **SHORT).images
        embeds = pipe(prompt_embeds=cond, negative_prompt_embeds=uncond, **SHORT).images
        assert torch.equal(text, embeds)
        assert not close(pipe(PROMPTS, **SHORT).images, text, 1e-3)


class TestWhatComesOut:
    def test_output_types(self, pipe):
        def run(output_type):
            return pipe(PROMPTS, **{**SHORT, "output_type": output_type}).images

        latent, pt, array, pil = (run(kind) for kind in ("latent", "pt", "np", "pil"))
        assert latent.shape == (2, 4, 8, 8) and latent.dtype == torch.float32
        assert pt.shape == (2, 3, 32, 32) and 0 <= pt.min() and pt.max() <= 1
        assert array.shape == (2, 32, 32, 3)
        assert all(isinstance(image, PIL.Image.Image) for image in pil)
        np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        np.testing.assert_array_equal(np.stack(pil), (array * 255).round().astype("uint8"))

    def test_a_tuple_on_request(self, pipe):
        images, flagged = pipe("a red dog", return_dict=False, **SHORT)
        assert images.shape == (1, 4, 8, 8) and flagged is None

    def test_sizes(self, pipe):
        images = pipe("a red dog", height=48, width=16, **{**SHORT, "output_type": "np"}).images
        assert images.shape == (1, 48, 16, 3)

    def test_the_global_random_state_is_not_touched_by_a_seed(self, pipe):
        state = torch.get_rng_state()
        pipe("a red dog", **SHORT)
        assert torch.equal(torch.get_rng_state(), state)

    def test_without_seed_or_generator_torch_draws(self, pipe):
        options = {key: SHORT[key] for key in SHORT if key != "seed"}
        first, second = (pipe("a red dog", **options).images for _ in range(2))
        assert not torch.equal(first, second)

    @pytest.mark.sweep(dtype=1)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_latents_stay_float32_whatever_the_networks_compute_in(self, tiny, dtype):
        expected = tiny.shared()(PROMPTS, **SHORT).images
        pipe = tiny.shared(dtype)
        assert {p.dtype for p in pipe.unet.parameters()} == {dtype}
        seen = []
        pipe(
            PROMPTS,
            callback_on_step_end=lambda _, k, t, tensors: seen.append(tensors["latents"]),
            **SHORT,
        )
        assert {x.dtype for x in seen} == {torch.float32}
        # a dozen layers, each rounded to 8 (11) bits, in each of 2 steps
        assert close(seen[-1], expected, 24 * torch.finfo(dtype).eps)
        assert torch.isfinite(pipe(PROMPTS, **{**SHORT, "output_type": "pt"}).images).all()


class TestCallback:
    def test_gets_what_it_asked_for(self, pipe):
        seen = []

        def look(pipe, k, t, tensors):
            seen.append((k, int(t), {name: tuple(x.shape) for name, x in tensors.items()}))

        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        pipe(PROMPTS, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, **SHORT)
        embeds = (2, 2, 24, 16)  # (M, B, L, D)
        shapes = dict(zip(names, [(2, 4, 8, 8), embeds, embeds], strict=True))
        assert seen == [(0, 501, shapes), (1, 1, shapes)]

    def test_replaces_latents(self, pipe):
        def zero(pipe, k, t, tensors):
            return {"latents": torch.zeros_like(tensors["latents"])}

        assert pipe(PROMPTS, callback_on_step_end=zero, **SHORT).images.eq(0).all()

    def test_may_interrupt(self, one_by_one, calls):
        def stop(pipe, k, t, tensors):
            pipe._interrupt = True

        one_by_one(PROMPTS, callback_on_step_end=stop, **SHORT)
        assert len(calls) == 2  # two objectives, one step
        one_by_one(PROMPTS, **SHORT)
        assert len(calls) == 6  # the next call runs to its end


def test_prepare_runs_one_step_of_every_objective(one_by_one, calls):
    pipe = one_by_one
    pipe.prepare(batch_size=2, height=32, width=32, num_inference_steps=5)
    assert calls == [("warm",), ("cool",)]
    with pytest.raises(mf.InvalidShape, match="33"):
        pipe.prepare(height=33)


def test_progress_bar_counts_the_steps(tiny, capsys):
    pipe = mf.MSDDAPipeline.from_pipe(tiny.shared())
    pipe("a red dog", **SHORT)
    assert "2/2" in capsys.readouterr().err

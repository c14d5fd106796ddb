# SPDX-License-Identifier: Apache-2.0
"""What a user of stock pipelines passes without a second thought: taken as there, or named."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionPipeline,
)

import msdda_fast as mf
from tests.tiny_model import quiet

SHORT = dict(num_inference_steps=2, seed=3, guidance_scale=2.0, output_type="latent")
STOCK = {
    name: parameter.default
    for name, parameter in inspect.signature(StableDiffusionPipeline.__call__).parameters.items()
    if parameter.default is not inspect.Parameter.empty and name not in ("prompt", *SHORT)
}
ENCODE = ("a red dog", "cpu", 1, True)


@pytest.fixture(scope="module")
def expected(pipe):
    return pipe("a red dog", **SHORT).images


class TestArguments:
    @pytest.mark.parametrize("name", ["eta", "guidance_rescale", "clip_skip", "sigmas", "callback"])
    def test_one_at_its_default_changes_nothing(self, pipe, expected, name):
        value = STOCK.get(name)
        assert pipe("a red dog", **SHORT, **{name: value}).images.equal(expected)

    def test_all_of_them_at_their_defaults_change_nothing(self, pipe, expected):
        assert {"timesteps", "cross_attention_kwargs", "ip_adapter_image"} <= STOCK.keys()
        assert pipe("a red dog", **SHORT, **STOCK).images.equal(expected)
        assert pipe("a red dog", **SHORT, eta=0, callback_steps=None).images.equal(expected)

    @pytest.mark.parametrize(
        "change",
        [dict(eta=1.0), dict(guidance_rescale=0.7), dict(clip_skip=0), dict(ip_adapter_image=[])],
        ids=str,
    )
    def test_other_values_are_refused_by_name(self, pipe, calls, change):
        with pytest.raises(ValueError, match=rf"{next(iter(change))}= is not supported"):
            pipe("a red dog", **SHORT, **change)
        assert not calls

    @pytest.mark.parametrize(
        "change",
        [
            dict(seed=np.int64(3)),
            dict(seed=np.array([3])),
            dict(seed=torch.tensor(3)),
            dict(seed=[np.uint8(3)]),
            dict(num_inference_steps=np.int64(2)),
            dict(height=np.int32(32), width=torch.tensor(32)),
            dict(num_images_per_prompt=np.int64(1)),
            dict(guidance_scale=np.float32(2)),
            dict(guidance_scale=torch.tensor(2.0)),
            dict(guidance_scale=np.array([2, 2])),
        ],
        ids=str,
    )
    def test_numbers_of_numpy_and_torch(self, pipe, expected, change):
        assert pipe("a red dog", **{**SHORT, **change}).images.equal(expected)

    @pytest.mark.parametrize("seed", [2**64, [2**64 + 3], np.array([2.0**70]), "3"], ids=repr)
    def test_seeds_beyond_64_bits_do_not_wrap(self, pipe, calls, seed):
        with pytest.raises(ValueError, match="a seed must be an integer"):
            pipe("a red dog", **{**SHORT, "seed": seed})
        assert not calls

    def test_prepare_takes_numpys_integers(self, pipe):
        pipe.prepare(np.int64(1), np.int64(32), np.int64(32), np.int64(2))


class TestComponentsLeftOut:
    @pytest.mark.parametrize("left_out", [["unet", "vae"], ["unet", "vae", "scheduler"]], ids=str)
    def test_prompts_can_be_encoded(self, tiny, pipe, left_out, tmp_path):
        none = dict.fromkeys(left_out)
        for make in (
            lambda: mf.MSDDAPipeline.from_pretrained(tiny.folder, **none),
            lambda: mf.MSDDAPipeline(**{**pipe.components, **none}, requires_safety_checker=False),
            lambda: mf.MSDDAPipeline.from_pipe(pipe, **none),
        ):
            encoder = make()
            encoder.save_pretrained(tmp_path / "model")
            for ours in (encoder, mf.MSDDAPipeline.from_pretrained(tmp_path / "model", **none)):
                for actual, wanted in zip(
                    ours.encode_prompt(*ENCODE), pipe.encode_prompt(*ENCODE), strict=True
                ):
                    assert actual.equal(wanted)
                for use in (lambda: ours("a red dog", **SHORT), ours.prepare):  # noqa: B023
                    with pytest.raises(ValueError, match=r"no unet \(unet=None\)"):
                        use()
        with pytest.raises(ValueError, match="without a unet"):
            mf.MSDDAPipeline.from_pretrained(tiny.folder, unet=None, objectives=tiny.objectives())
        with pytest.raises(ValueError, match="without a unet"):
            mf.MSDDAPipeline.from_pipe(encoder, objectives={"x": mf.Objective.base()})

    def test_without_scheduler_a_call_is_refused(self, tiny, calls):
        pipe = tiny.load(scheduler=None)
        with pytest.raises(ValueError, match="no scheduler"):
            pipe("a red dog", **SHORT)
        assert not calls

    def test_without_vae_there_are_latents(self, tiny, expected, calls):
        pipe = tiny.load(vae=None)
        assert torch.allclose(pipe("a red dog", **SHORT).images, expected, atol=1e-5)
        calls.clear()
        with pytest.raises(ValueError, match="no vae"):
            pipe("a red dog", **{**SHORT, "output_type": "pil"})
        assert not calls

    def test_without_text_encoder_there_are_embeddings(self, tiny, pipe, expected):
        alone = tiny.load(text_encoder=None, tokenizer=None)
        cond, uncond = pipe.encode_prompt(*ENCODE)
        images = alone(prompt_embeds=cond, negative_prompt_embeds=uncond, **SHORT).images
        assert torch.allclose(images, expected, atol=1e-5)
        for request in (dict(prompt="a red dog"), dict(prompt_embeds=cond)):
            with pytest.raises(ValueError, match="no text_encoder"):
                alone(**request, **SHORT)


class TestDtypes:
    def test_by_component(self, tiny, pipe):
        half = tiny.load(torch_dtype={"unet": torch.bfloat16, "default": torch.float32})
        assert (half.unet.dtype, half.vae.dtype) == (torch.bfloat16, torch.float32)
        assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}  # adapters too
        assert {p.dtype for p in half.text_encoder.parameters()} == {torch.float32}
        near, exact = (p("a red dog", **SHORT).images for p in (half, pipe))
        assert (near - exact).norm() < 0.1 * exact.norm() and near.dtype == torch.float32
        assert half("a red dog", num_inference_steps=2).images[0].size == (32, 32)

    @pytest.mark.parametrize(
        "dtype, message",
        [
            ({"unett": torch.float16}, "'unett'.*text_encoder"),
            ({"unet": "float16"}, "'float16'"),
            ({"unet": torch.int8}, "int8"),
            ("auto", "'auto'"),
        ],
        ids=str,
    )
    def test_refused(self, tiny, dtype, message):
        with pytest.raises(ValueError, match=message):
            tiny.load(torch_dtype=dtype)
        with pytest.raises(ValueError, match=message):
            mf.MSDDAPipeline.from_pipe(tiny.shared(), torch_dtype=dtype)

    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    def test_from_pipe_casts_the_modules_that_both_share(self, tiny, name):
        source = tiny.load()
        pipe = quiet(mf.MSDDAPipeline.from_pipe(source, **{name: torch.bfloat16}))
        assert pipe.unet is source.unet
        assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
        expected = tiny.shared(torch.bfloat16)("a red dog", **SHORT).images
        assert pipe("a red dog", **SHORT).images.equal(expected)


class TestNotOurs:
    @pytest.mark.parametrize(
        "auto",
        [AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting],
        ids=lambda auto: auto.__name__,
    )
    def test_auto_pipelines_do_not_take_ours(self, pipe, auto):
        """They would keep one adapter of many; diffusers says which class it does not know."""
        with pytest.raises(ValueError, match="linked to MSDDAPipeline"):
            auto.from_pipe(pipe)

    @pytest.mark.parametrize("option", ["dduf_file", "custom_pipeline"])
    def test_options_that_make_another_pipeline(self, tiny, option):
        with pytest.raises(ValueError, match=f"{option}= is not supported"):
            mf.MSDDAPipeline.from_pretrained(tiny.folder, **{option: "x"})

# SPDX-License-Identifier: Apache-2.0
"""Image to image and inpainting on the networks of a loaded pipeline."""

import copy

import diffusers
import pytest
import torch
from PIL import Image

import msdda_fast as mf
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipelines.tasks import check_from_text, for_task, shared_guidance, task_class
from tests.families import images, videos, xl
from tests.families.lockstep import draw, quiet
from tests.families.parts import pixels

W = {"a": 0.3, "b": 0.7}


def attached(make, **options):
    pipe, call = make(batch=1)
    return quiet(mf.MSDDAPipeline.from_pipe(pipe, **options)), call


class TestForTask:
    def test_it_is_the_stock_class_with_the_same_objectives(self):
        objectives = {"x": mf.Objective(["a", "b"], scale=[0.5, 1.0]), "base": mf.Objective()}
        pipe, call = attached(images.flux, objectives=objectives)
        made = for_task(pipe, "image-to-image")
        assert isinstance(made, diffusers.FluxImg2ImgPipeline)
        assert made.objectives == pipe.objectives and made.adapter_sets == pipe.adapter_sets
        assert made.transformer is pipe.transformer and made.scheduler is not pipe.scheduler
        expected = quiet(diffusers.FluxImg2ImgPipeline(**made.components))
        expected = mf.MSDDAPipeline.from_pipe(expected, objectives=objectives)
        call = {**call, "image": pixels(1, 32), "strength": 0.7}
        weights = {"x": 0.3, "base": 0.7}
        got, wanted = (draw(p, call, weights=weights, seed=3) for p in (made, expected))
        assert torch.equal(got, wanted)
        assert made._progress_bar_config == {"disable": True}

    def test_inpainting_keeps_what_the_mask_does_not_repaint(self):
        pipe, call = attached(xl.text)
        made = for_task(pipe, "inpaint")
        assert isinstance(made, diffusers.StableDiffusionXLInpaintPipeline)
        del call["guidance_rescale"]
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., 16:] = 1
        given = {**call, "mask_image": mask, "strength": 1.0}
        first, second = (
            draw(made, {**given, "image": image}, weights=W, seed=3)
            for image in (pixels(1, 32), pixels(1, 32).flip(-1))
        )
        assert not torch.equal(first[..., :8], second[..., :8])

    def test_stable_diffusion_has_them_too(self, tiny):
        pipe = tiny.shared()
        made = for_task(pipe, "image-to-image")
        assert isinstance(made, diffusers.StableDiffusionImg2ImgPipeline)
        assert made.unet is pipe.unet and list(made.objectives) == ["warm", "cool"]
        stock = copy.copy(diffusers.StableDiffusionImg2ImgPipeline(**made.components))
        stock.scheduler = copy.deepcopy(made.scheduler)
        etas = {"warm": mf.Objective("warm", eta=1.0), "cool": mf.Objective("cool", eta=0.8)}
        expected = quiet(mf.MSDDAPipeline.from_pipe(stock, objectives=etas))
        call = {"prompt": "a red dog", "image": Image.new("RGB", (32, 32), "red"), "strength": 0.8}
        weights = {"warm": 0.4, "cool": 0.6}
        got, wanted = (draw(p, call, weights=weights, seed=3) for p in (made, expected))
        assert torch.equal(got, wanted)
        assert isinstance(for_task(pipe, "inpaint"), diffusers.StableDiffusionInpaintPipeline)

    def test_guidance_of_their_own_must_be_shared(self, tiny):
        pipe = tiny.only(mf.Objective("warm", guidance_scale=2.0))
        assert shared_guidance(pipe) == 2.0 and shared_guidance(tiny.shared()) is None
        assert for_task(pipe, "image-to-image").objectives == {"only": mf.Objective("warm")}
        both = {"warm": mf.Objective(guidance_scale=2.0), "cool": mf.Objective()}
        pipe = mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=both)
        with pytest.raises(ValueError, match="'warm' has a guidance_scale"):
            for_task(pipe, "image-to-image")

    def test_the_base_keeps_the_accelerator(self, tiny):
        pipe = tiny.load(accelerator=tiny.cool, objectives={"warm": mf.Objective(tiny.warm)})
        made = for_task(pipe, "image-to-image")
        ((adapter, scale),) = made.base_set
        assert (adapter, scale) == (pipe.base_variant.adapter, 1.0)
        assert made.accelerator == pipe.accelerator is not None
        assert type(made.scheduler) is type(pipe.scheduler) is diffusers.LCMScheduler
        again = for_task(made, "inpaint")
        assert (again.base_set, again.accelerator) == (made.base_set, made.accelerator)

    def test_a_class_that_takes_images_is_its_own(self):
        pipe, _ = attached(images.flux_kontext)
        assert for_task(pipe, "image-to-image") is pipe


class TestTaskClass:
    @pytest.mark.parametrize(
        ("kind", "task", "expected"),
        [
            ("StableDiffusionXLInpaint", "image-to-image", "StableDiffusionXLImg2Img"),
            ("StableDiffusion3", "inpaint", "StableDiffusion3Inpaint"),
            ("QwenImage", "image-to-image", "QwenImageImg2Img"),
            ("LTXImageToVideo", "image-to-image", "LTXImageToVideo"),
            ("QwenImageEdit", "image-to-image", "QwenImageEdit"),
            ("StableDiffusion", "inpaint", "StableDiffusionInpaint"),
        ],
    )
    def test_of_each_family(self, kind, task, expected):
        found = task_class(getattr(diffusers, f"{kind}Pipeline"), task)
        assert found.__name__ == f"{expected}Pipeline"

    def test_what_a_family_lacks_is_named(self):
        pipe, _ = attached(videos.wan)
        with pytest.raises(UnsupportedNetwork, match="WanPipeline cannot do image-to-image"):
            for_task(pipe, "image-to-image")
        with pytest.raises(UnsupportedNetwork, match="FluxKontextPipeline cannot do inpaint"):
            task_class(diffusers.FluxKontextPipeline, "inpaint")

    def test_a_controlnet_needs_its_own_image(self):
        with pytest.raises(UnsupportedNetwork, match="needs control_image as well"):
            task_class(diffusers.StableDiffusionXLControlNetPipeline, "image-to-image")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("StableDiffusionXLControlNet", "needs a control image"),
        ("FluxControl", "needs a control image"),
        ("LTXImageToVideo", "starts from an image"),
        ("StableDiffusionXLInpaint", "starts from an image"),
    ],
)
def test_what_needs_an_image_is_named(kind, message):
    with pytest.raises(UnsupportedNetwork, match=message):
        check_from_text(getattr(diffusers, f"{kind}Pipeline"))
    for text in (mf.MSDDAPipeline, diffusers.Flux2Pipeline, diffusers.LTX2Pipeline):
        check_from_text(text)

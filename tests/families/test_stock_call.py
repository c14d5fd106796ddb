# SPDX-License-Identifier: Apache-2.0
"""What is read off the calls of pipelines of diffusers."""

import diffusers
import pytest

import msdda_fast as mf
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipelines.stock_call import StockCall


def call(name):
    return StockCall.of(getattr(diffusers, f"{name}Pipeline"))


@pytest.mark.parametrize(
    ("name", "makes", "guidance", "copies", "negative"),
    [
        ("StableDiffusion3", "images", "guidance_scale", "num_images_per_prompt", True),
        ("Flux", "images", "guidance_scale", "num_images_per_prompt", False),
        ("Flux2", "images", "guidance_scale", "num_images_per_prompt", False),
        ("QwenImage", "images", "true_cfg_scale", "num_images_per_prompt", True),
        ("Wan", "video", "guidance_scale", "num_videos_per_prompt", True),
        ("StableAudio", "audio", "guidance_scale", "num_waveforms_per_prompt", True),
    ],
)
def test_families_differ(name, makes, guidance, copies, negative):
    taken = call(name)
    assert taken.makes == makes and not taken.captured
    assert taken.argument("guidance_scale") == guidance
    assert taken.argument("num_images") == copies
    assert (taken.argument("negative_prompt") is not None) == negative


def test_names_of_ours_become_the_familys():
    given = {"num_images": 2, "strength": 0.5, "guidance_scale": 4.0, "negative_prompt": " "}
    assert call("QwenImage").arguments(**given, height=None) == {
        "num_images_per_prompt": 2,
        "objective_strength": 0.5,
        "true_cfg_scale": 4.0,
        "negative_prompt": " ",
    }
    ours = StockCall.of(mf.MSDDAPipeline)
    assert ours.captured and ours.arguments(strength=0.5) == {"strength": 0.5}
    image = call("StableDiffusion3Img2Img").arguments(strength=0.5, image_strength=0.8)
    assert image == {"objective_strength": 0.5, "strength": 0.8}


@pytest.mark.parametrize(
    ("name", "given", "field", "message"),
    [
        ("Flux2", ["negative_prompt"], "negative_prompt", "Flux2Pipeline takes no negative_prompt"),
        ("Flux", ["negative_prompt"], "negative_prompt", "ignores it unless true_cfg_scale"),
        ("QwenImage", ["guidance_scale"], "guidance_scale", "from a negative prompt only"),
        ("StableDiffusion3", ["image_strength"], "image_strength", "takes no image_strength"),
        ("StableDiffusionXLImg2Img", ["image", "height"], "height", "takes no height"),
        ("StableDiffusion3", ["num_frames"], "num_frames", "takes no num_frames"),
    ],
)
def test_what_a_family_lacks_is_named(name, given, field, message):
    with pytest.raises(UnsupportedNetwork, match=message) as refused:
        call(name).check(given, {field: "--option"})
    assert refused.value.field == field and str(refused.value).startswith("--option: ")

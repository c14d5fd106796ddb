# SPDX-License-Identifier: Apache-2.0
"""What is read off a pipeline holds when it draws: sizes, frames, and what its call lacks."""

import copy

import diffusers
import numpy as np
import pytest
import torch

from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipelines.capabilities import Capabilities, check_stock_inputs
from tests.families import images, videos, xl
from tests.families.encoders import Tokenizer
from tests.families.lockstep import made
from tests.families.table import FAMILIES

#: From a text alone. Lumina 2 takes 8 for the factor of any autoencoder, and the tiny one has 2.
TEXTS = {
    name: family
    for name, family in FAMILIES.items()
    if not any(word in name for word in ("img2img", "inpaint", "Pix2Pix", "Control", "Edit"))
    and name not in ("FLUX Kontext", "LTX image to video", "LTX-2", "SDXL IP-Adapter", "Lumina 2")
}
QUICK = ("SD3", "FLUX", "Wan 2.1", "LTX")


def capable(make):
    """A pipeline, the arguments of its call for one prompt, and its capabilities."""
    pipe, call = made(make)
    for name in pipe.components:
        if "tokenizer" in name:
            pipe.__dict__[name] = Tokenizer()
    return pipe, call, Capabilities.of(pipe)


def size_of(pipe, call, **size):
    call = {**copy.deepcopy(call), **size, "num_inference_steps": 1, "output_type": "np"}
    torch.manual_seed(0)
    array = np.asarray(pipe(**call)[0])
    return array.shape[-3:-1]


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in TEXTS],
)
def test_images_are_of_any_multiple_of_the_unit_and_of_nothing_less(name):
    pipe, call, takes = capable(TEXTS[name].make)
    height, width = 3 * takes.unit, 2 * takes.unit
    assert size_of(pipe, call, height=height, width=width) == (height, width)
    odd = height + takes.unit // 2
    try:
        assert size_of(pipe, call, height=odd, width=width) != (odd, width)
    except (ValueError, RuntimeError):
        pass  # refused, or a tensor that does not fit


def test_frames_and_sizes_that_calls_have_by_default():
    wan = capable(videos.wan)[2]
    assert (wan.frames, wan.height, wan.width) == (81, 480, 832)
    flux = capable(images.flux)[2]
    assert (flux.frames, flux.height, flux.width) == (1, 128, 128)


def test_lists_of_images_that_belong_to_all_prompts():
    assert capable(images.flux_kontext)[2].mixes_images
    assert not capable(images.flux_img2img)[2].mixes_images
    assert not capable(xl.text)[2].mixes_images


class Seedless(diffusers.DiffusionPipeline):
    """Its call takes no generator."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, prompt=None, num_inference_steps=2, output_type="pil"):
        return None


def test_calls_that_lack_what_every_request_needs():
    parts = made(images.sd3)[0].components
    pipe = Seedless(parts["transformer"], parts["scheduler"])
    with pytest.raises(UnsupportedNetwork, match="Seedless takes no generator"):
        Capabilities.of(pipe)
    with pytest.raises(UnsupportedNetwork, match=r"LTX2Pipeline makes sound \("):
        Capabilities.of(made(videos.ltx2)[0])
    with pytest.raises(UnsupportedNetwork, match="has no tokenizer"):
        Capabilities.of(made(images.sd3)[0])


def test_what_the_call_itself_checks_is_checked_by_its_names():
    pipe, _, _ = capable(images.sd3)
    check_stock_inputs(pipe, {"prompt": "a dog", "height": 16, "width": 16})
    with pytest.raises(ValueError, match=r"height.*divisible"):
        check_stock_inputs(pipe, {"prompt": "a dog", "height": 15, "width": 16})

# SPDX-License-Identifier: Apache-2.0
"""The flow model inside the package: loads offline by its name, and is what its files say."""

import hashlib
import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import msdda_fast as mf
from msdda_fast import assets
from tests.tiny_model import quiet

NAME = "msdda-fast/emoji-flow"
PROMPTS = ["A purple colored dog.", "A blue car and a pink sheep."]


@pytest.fixture(scope="module")
def shipped():
    return quiet(mf.MSDDAPipeline.from_pretrained(NAME))


def draw(pipe, **options):
    request = dict(num_inference_steps=2, guidance_scale=1.0, **options)
    return pipe(PROMPTS, **request).images


def test_objectives_have_unequal_noise(shipped):
    assert {name: one.noise for name, one in shipped.objectives.items()} == {
        "aesthetic": mf.FlowSDE(0.7),
        "consistency": mf.FlowSDE(0.5),
    }


def test_it_is_a_stock_pipeline_in_float32(shipped):
    assert isinstance(shipped, StableDiffusion3Pipeline)
    assert type(shipped.scheduler) is FlowMatchEulerDiscreteScheduler
    parts = [part for part in shipped.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_stock_diffusers_draws_with_it(shipped):
    folder = assets.resolve(NAME)
    stock = quiet(StableDiffusion3Pipeline.from_pretrained(folder))
    stock.load_lora_weights(folder / "aesthetic", adapter_name="aesthetic")
    expected = draw(stock, generator=torch.manual_seed(0), output_type="latent")
    always = {"aesthetic": mf.Objective(NAME, subfolder="aesthetic")}
    ours = quiet(mf.MSDDAPipeline.from_pretrained(NAME, objectives=always))
    actual = draw(ours, generator=torch.manual_seed(0), output_type="latent")
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_images_are_64_pixels_and_the_weights_matter(shipped):
    ends = [draw(shipped, weights=w, seed=0, output_type="np") for w in ([1, 0], [0, 1])]
    assert ends[0].shape == (2, 64, 64, 3)
    assert abs(ends[0] - ends[1]).max() > 1 / 255


def test_the_weights_are_small_and_the_manifest_is_theirs():
    folder = assets.resolve(NAME)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 20_000_000
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["id"] == NAME and (folder / manifest["notices"]).is_file()
    assert manifest["objectives"] == json.loads((folder / "objectives.json").read_text())
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest

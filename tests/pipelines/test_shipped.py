# SPDX-License-Identifier: Apache-2.0
"""The model inside the package: loads offline by its name, and is what its files say."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

import msdda_fast as mf
from msdda_fast import assets
from tests.tiny_model import quiet

NAME = "msdda-fast/emoji"
PROMPTS = ["A purple colored dog.", "A blue car and a pink sheep."]


@pytest.fixture(scope="module")
def shipped():
    return quiet(mf.MSDDAPipeline.from_pretrained(NAME))


def test_objectives_are_the_papers_two(shipped):
    assert {name: o.eta for name, o in shipped.objectives.items()} == {
        "aesthetic": 1.0,
        "consistency": 0.8,
    }


def test_components_are_stock_classes_in_float32(shipped):
    networks = (shipped.unet, shipped.vae, shipped.text_encoder)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
    assert isinstance(shipped.scheduler, DDIMScheduler)
    # Stable Diffusion 1.5's flags: ALGORITHMS.md 1
    config = shipped.scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert shipped.scheduler.alphas_cumprod[0] == pytest.approx(0.99915)


def test_stock_diffusers_draws_with_it_and_is_told_no_dtype(shipped):
    folder = assets.resolve(NAME)
    stock = quiet(StableDiffusionPipeline.from_pretrained(folder))
    networks = (stock.unet, stock.vae, stock.text_encoder)
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
    stock.load_lora_weights(folder / "aesthetic", adapter_name="aesthetic")
    request = dict(num_inference_steps=3, guidance_scale=3.0, output_type="latent")
    expected = stock(PROMPTS, generator=torch.manual_seed(0), eta=1.0, **request).images
    always = {"aesthetic": mf.Objective(NAME, subfolder="aesthetic")}  # as stock: at all timesteps
    ours = quiet(mf.MSDDAPipeline.from_pretrained(NAME, objectives=always))
    actual = ours(PROMPTS, generator=torch.manual_seed(0), **request).images
    # float32, three steps: as in test_equivalence
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_different_prompts_have_different_tokens(shipped):
    ids = shipped.tokenizer([*PROMPTS, "A xylophone?"], padding="max_length").input_ids
    assert len({tuple(row) for row in ids}) == 3
    assert all(len(row) == shipped.tokenizer.model_max_length for row in ids)


def test_images_are_64_pixels_and_the_weights_matter(shipped):
    def run(**weights):
        request = dict(num_inference_steps=5, seed=0, output_type="np")
        return shipped(PROMPTS, weights=weights, **request).images

    aesthetic, consistency = run(aesthetic=1, consistency=0), run(aesthetic=0, consistency=1)
    assert aesthetic.shape == (2, 64, 64, 3)
    assert abs(aesthetic - consistency).max() > 1 / 255


def test_at_most_20_megabytes_and_the_accelerator():
    folder = assets.resolve(NAME)
    files = [file for file in folder.rglob("*") if file.is_file()]
    own = [file for file in files if file.parent.name != "accelerator"]
    assert sum(file.stat().st_size for file in own) <= 20_000_000
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionPipeline"
    )


def test_no_file_has_an_entry_that_diffusers_warns_of():
    config = json.loads((assets.resolve(NAME) / "vae" / "config.json").read_text())
    assert "block_out_channels" not in config  # AutoencoderTiny derives it from the decoder's


def test_it_ships_with_an_accelerator():
    pipe = quiet(mf.MSDDAPipeline.from_pretrained(NAME, accelerator="own"))
    assert isinstance(pipe.scheduler, LCMScheduler) and pipe.accelerator.steps == 4
    seen = []

    def note(pipe, k, t, tensors):
        seen.append(int(t))
        return {}

    image = pipe(PROMPTS[0], seed=0, output_type="pt", callback_on_step_end=note).images
    assert image.shape == (1, 3, 64, 64) and seen == [999, 759, 499, 259]
    file = assets.resolve(NAME) / "accelerator" / "pytorch_lora_weights.safetensors"
    assert file.stat().st_size < 2e6

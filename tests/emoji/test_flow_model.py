# SPDX-License-Identifier: Apache-2.0
"""The flow model's folder is one of stock Stable Diffusion 3, and gives what training saw."""

import json
import logging

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from transformers import CLIPTextModel

from msdda_fast.assets import resolve
from msdda_fast.emoji.flow_model import (
    T5_TOKENS,
    OneForMany,
    assemble_flow,
    save_flow,
    shorten,
    shorten_calls,
    small_transformer,
)
from msdda_fast.emoji.train_base import tokenize
from msdda_fast.emoji.train_flow import encode
from tests.tiny_model import quiet

PROMPTS = ["A purple colored dog.", "A blue car and a pink sheep.", ""]


def random_transformer(text_width):
    torch.manual_seed(0)
    made = small_transformer(text_width)
    made.transformer_blocks = made.transformer_blocks[-2:]
    for parameter in made.parameters():  # the output layer begins with zeros
        torch.nn.init.normal_(parameter, std=0.05)
    made.register_to_config(num_layers=2)
    return made.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("flow")
    network = random_transformer(96)
    network.set_attn_processor(OneForMany())  # as training leaves it
    save_flow(network, target)
    return target


@pytest.fixture
def pipe(folder):
    return quiet(StableDiffusion3Pipeline.from_pretrained(folder))


def draw(pipe, **options):
    request = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent", **options)
    return pipe(PROMPTS[:2], generator=torch.manual_seed(0), **request).images


@torch.no_grad()
def test_one_token_stands_for_all_of_t5():
    network = random_transformer(8)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    pooled = torch.randn(2, 16, generator=generator)
    t = torch.tensor([300.0, 700.0])
    appended = [torch.cat([text, torch.zeros(2, n, 16)], 1) for n in (T5_TOKENS, 1)]
    stock = network(x, appended[0], pooled, t, return_dict=False)[0]
    without = network(x, appended[1], pooled, t, return_dict=False)[0]
    network.set_attn_processor(OneForMany())
    ours = network(x, appended[1], pooled, t, return_dict=False)[0]
    assert (ours - stock).abs().max() < 1e-5 * stock.abs().max()
    assert (without - stock).abs().max() > 1e-3 * stock.abs().max()


def test_stock_reads_the_folder_and_has_nothing_to_say_but_of_the_small_autoencoder(folder, caplog):
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        pipe = quiet(StableDiffusion3Pipeline.from_pretrained(folder))
        image = pipe(PROMPTS[0], num_inference_steps=2, output_type="np").images
    finally:
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).removeHandler(caplog.handler)
    assert [m for m in caplog.messages if not m.startswith("Expected types for vae")] == []
    assert image.shape == (1, 64, 64, 3)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert len(parts) == 5


def test_stock_encodes_prompts_as_training_did(pipe):
    encoder = CLIPTextModel.from_pretrained(resolve("msdda-fast/emoji") / "text_encoder")
    hidden, pooled = encode(encoder, tokenize(pipe.tokenizer, PROMPTS))
    found, _, found_pooled, _ = pipe.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False
    )
    expected = torch.cat([hidden[:, :-1], hidden[:, -1:].expand(-1, T5_TOKENS, -1)], 1)
    # half a unit of float16 in the stored weights is the same on both sides
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_pooled, pooled, rtol=1e-5, atol=1e-6)
    assert (found[0, :24] - found[1, :24]).abs().max() > 0.1


def test_the_assembled_pipeline_has_stock_attention():
    network = random_transformer(96)
    network.set_attn_processor(OneForMany())
    assembled = assemble_flow(network).transformer.attn_processors
    assert {type(p) for p in assembled.values()} == {JointAttnProcessor2_0}


def test_one_token_of_t5_draws_the_same(pipe):
    stock = draw(pipe)
    short = draw(pipe, **shorten(pipe))
    assert (short - stock).abs().max() < 1e-5 * stock.abs().max()
    shorten_calls(pipe)
    assert torch.equal(draw(pipe), short)


def test_the_tokenizers_are_the_shipped_one(folder):
    shipped = (resolve("msdda-fast/emoji") / "tokenizer" / "tokenizer.json").read_bytes()
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        assert (folder / name / "tokenizer.json").read_bytes() == shipped
    assert "block_out_channels" not in json.loads((folder / "vae" / "config.json").read_text())

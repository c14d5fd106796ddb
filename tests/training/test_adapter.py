# SPDX-License-Identifier: Apache-2.0
"""The adapter: starts as the base model, switches off, and is a LoRA that diffusers loads."""

import json

import pytest
import torch
from safetensors import safe_open

from msdda_fast.errors import AdapterMismatch
from msdda_fast.training import add_lora, load_lora, save_lora
from msdda_fast.training.adapter import base_model, lora_parameters

from .conftest import SHAPE, TOKENS, WIDTH, TinyDenoiser, make_unet


@pytest.fixture(scope="module")
def unet():
    return make_unet()


def predict(unet):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *SHAPE, generator=generator)
    text = torch.randn(2, TOKENS, WIDTH, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([900, 20]), encoder_hidden_states=text, return_dict=False)[0]


def fill_lora(unet, seed=5, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(unet):
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def test_adapter_is_rank_4_on_every_attention_projection_and_starts_as_the_base_model():
    unet = make_unet()
    before = predict(unet)
    projections = [n for n, _ in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v"))]
    projections += [n for n, _ in unet.named_modules() if n.endswith("to_out.0")]
    parameters = add_lora(unet)
    assert len(parameters) == 2 * len(projections) > 0
    assert {min(p.shape) for p in parameters} == {4}
    assert [p for p in unet.parameters() if p.requires_grad] == parameters
    assert torch.equal(predict(unet), before)


def test_base_model_is_the_network_without_its_adapter_and_ends_with_its_context():
    unet = make_unet()
    before = predict(unet)
    add_lora(unet)
    fill_lora(unet)
    adapted = predict(unet)
    with base_model(unet):
        assert torch.equal(predict(unet), before)
    assert torch.equal(predict(unet), adapted)
    assert not torch.equal(adapted, before)


def test_down_projection_is_gaussian_of_width_1_over_rank_and_seeded():
    drawn = []
    for seed in (7, 7, 8):
        network = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4096, 8)})
        global_state = torch.random.get_rng_state()
        down, up = add_lora(network, rank=4, seed=seed)
        assert torch.equal(global_state, torch.random.get_rng_state())
        assert up.abs().max() == 0
        drawn.append(down)
    count = drawn[0].numel()
    assert drawn[0].std().item() == pytest.approx(1 / 4, abs=4 * 0.25 / (2 * count) ** 0.5)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("lora_alpha", [4, 8])
def test_saved_folder_loads_in_stock_diffusers(tmp_path, lora_alpha):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet = make_unet()
    add_lora(unet, rank=4, lora_alpha=lora_alpha)
    fill_lora(unet)
    save_lora(unet, tmp_path)
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=make_unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_lora_weights(tmp_path, adapter_name="aligned")
    assert pipe.get_list_adapters() == {"unet": ["aligned"]}
    torch.testing.assert_close(predict(pipe.unet), predict(unet), rtol=1e-5, atol=1e-5)


def test_file_is_diffusers_own_layout_in_the_dtype_asked_for(tmp_path):
    unet = make_unet()
    add_lora(unet, rank=2, lora_alpha=6)
    fill_lora(unet)
    path = save_lora(unet, tmp_path / "new" / "folder", dtype=torch.float16)
    assert [file.name for file in path.parent.iterdir()] == ["pytorch_lora_weights.safetensors"]
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["lora_adapter_metadata"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert (described["unet.r"], described["unet.lora_alpha"]) == (2, 6)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_B.weight"
    own = dict(unet.named_parameters())[name.removeprefix("unet.").replace("_B.", "_B.default.")]
    assert torch.equal(tensors[name], own.half())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_a_saved_adapter_can_be_trained_on(tmp_path):
    first = make_unet()
    add_lora(first)
    fill_lora(first)
    save_lora(first, tmp_path)
    second = make_unet()
    parameters = add_lora(second, seed=1)
    load_lora(second, tmp_path)
    assert torch.equal(predict(second), predict(first))
    assert all(p.requires_grad for p in parameters)


def test_bad_input_is_named(tmp_path):
    network = TinyDenoiser()
    with pytest.raises(ValueError, match="call add_lora"):
        lora_parameters(network)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_lora(network, rank=0)
    with pytest.raises(ValueError, match="to_nothing"):
        add_lora(network, target_modules=["to_nothing"])
    add_lora(network)
    with pytest.raises(ValueError, match="already has LoRA layers"):
        add_lora(network)
    with pytest.raises(FileNotFoundError, match=r"pytorch_lora_weights\.safetensors"):
        load_lora(network, tmp_path)
    wider = TinyDenoiser()
    add_lora(wider, rank=2)
    save_lora(wider, tmp_path / "rank")
    with pytest.raises(AdapterMismatch, match=r"to_q\.lora_A\.weight: \(2, 4\), network: \(4, 4\)"):
        load_lora(network, tmp_path / "rank")
    scaled = TinyDenoiser()
    add_lora(scaled, lora_alpha=8)
    save_lora(scaled, tmp_path / "alpha")
    with pytest.raises(AdapterMismatch, match="lora_alpha 8, the network 4"):
        load_lora(network, tmp_path / "alpha")

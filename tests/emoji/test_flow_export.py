# SPDX-License-Identifier: Apache-2.0
"""The flow model's adapters are trained, exported and loaded as what they were trained as."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

import msdda_fast as mf
from msdda_fast.emoji import align_flow, evaluate_flow
from msdda_fast.emoji.align_flow import FLOW_ALIGNMENT
from msdda_fast.emoji.export_flow import export_flow
from msdda_fast.emoji.flow_model import save_flow
from msdda_fast.training import add_lora, load_lora
from tests.emoji.test_flow_model import random_transformer
from tests.tiny_model import quiet

PROMPTS = ["A purple colored dog.", "A blue car and a pink sheep."]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base with random weights, and one long step of training for each adapter."""
    folder = tmp_path_factory.mktemp("work")
    save_flow(random_transformer(96), folder / "base")
    (folder / "flow.jsonl").write_text("{}\n")
    for name, recipe in FLOW_ALIGNMENT.items():
        few = replace(recipe, steps=1, batch_size=2, scored_steps=1, lr=0.1)
        align_flow.align_flow(folder / "base", name, folder, few)
    return folder


@pytest.fixture(scope="module")
def folder(work, tmp_path_factory):
    target = tmp_path_factory.mktemp("assets") / "emoji-flow"
    export_flow(work, target)
    return target


@pytest.fixture(scope="module")
def pipe(folder):
    return quiet(mf.MSDDAPipeline.from_pretrained(folder))


def draw(pipe, **options):
    request = dict(num_inference_steps=3, guidance_scale=1.0, output_type="latent", **options)
    return pipe(PROMPTS, **request).images


def test_objectives_have_the_noise_and_the_timesteps_of_their_training(pipe):
    assert list(pipe.objectives) == ["aesthetic", "consistency"]
    for name, recipe in FLOW_ALIGNMENT.items():
        assert pipe.objectives[name].noise == mf.FlowSDE(recipe.level)
        assert pipe.objectives[name].timesteps == recipe.timesteps


def test_fused_images_depend_on_the_weights_and_on_their_own_seed(pipe):
    ends = [draw(pipe, weights=[1 - w, w], seed=[3, 4]) for w in (0, 0.5, 1)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (ends[one] - ends[other]).abs().max() > 1e-3
    other = draw(pipe, weights=[0.5, 0.5], seed=[3, 9])
    torch.testing.assert_close(other[0], ends[1][0], rtol=1e-5, atol=1e-5)
    assert (other[1] - ends[1][1]).abs().max() > 0.1


def test_stock_loads_an_adapter_and_draws_as_its_objective_without_noise(folder, pipe):
    stock = quiet(StableDiffusion3Pipeline.from_pretrained(folder))
    before = draw(stock, generator=torch.manual_seed(0))
    stock.load_lora_weights(folder / "consistency", adapter_name="consistency")
    expected = draw(stock, generator=torch.manual_seed(0))
    always = mf.Objective(folder, subfolder="consistency")
    own = quiet(mf.MSDDAPipeline.from_pretrained(folder, objectives={"consistency": always}))
    actual = draw(own, generator=torch.manual_seed(0))
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-3


def test_adapters_name_the_transformer_and_reach_both_streams(folder):
    with safe_open(folder / "aesthetic" / "pytorch_lora_weights.safetensors", "pt") as file:
        names = list(file.keys())
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)
    assert metadata["transformer.r"] == align_flow.RANK
    for layer in ("attn.to_q.", "attn.to_out.0.", "attn.add_k_proj.", "attn.to_add_out."):
        assert any(layer in name for name in names), layer
    network = StableDiffusion3Pipeline.from_pretrained(folder).transformer
    parameters = add_lora(network, rank=align_flow.RANK, target_modules=align_flow.TARGETS)
    load_lora(network, folder / "aesthetic")
    assert sum(bool((p != 0).any()) for p in parameters) > len(parameters) / 2  # half began as 0


def test_the_manifest_is_that_of_the_files(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["id"] == "msdda-fast/emoji-flow"
    assert manifest["objectives"] == json.loads((folder / "objectives.json").read_text())
    assert (folder / manifest["notices"]).is_file()
    assert "transformer/diffusion_pytorch_model.safetensors" in manifest["sha256"]
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert {path.name for path in (folder / "training").iterdir()} == {
        *("flow.jsonl", "align-aesthetic.jsonl", "align-consistency.jsonl")
    }


def test_an_evaluated_arm_is_kept_and_the_guidance_is_that_of_training_prompts(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate_flow, "NUM_STEPS", 2)
    monkeypatch.setattr(evaluate_flow, "TRAIN_PROMPTS", ("A red colored car.",))
    monkeypatch.setattr(evaluate_flow, "CHOICE_SEEDS", range(2))
    monkeypatch.setattr(evaluate_flow, "GUIDANCE", (1.0, 2.0))
    first = evaluate_flow.choose_guidance(folder, tmp_path)
    assert list(first) == [1.0, 2.0]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(kept) == 2
    assert evaluate_flow.choose_guidance(folder, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == kept


def test_arms_of_other_adapters_are_told_apart(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_flow, "NUM_STEPS", 1)

    def sample(name):
        objective = mf.Objective(folder, subfolder=name)
        arm = evaluate_flow.FlowArm("one", {"one": 1.0}, {"one": objective})
        evaluate_flow.sample_flow_arm(folder, arm, tmp_path, PROMPTS[:1], range(1))

    sample("aesthetic")
    sample("aesthetic")
    with pytest.raises(mf.ResumeMismatch, match="network"):
        sample("consistency")

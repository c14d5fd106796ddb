# SPDX-License-Identifier: Apache-2.0
"""The identity of a pipeline changes with everything that its images depend on, by name."""

import copy
from dataclasses import replace

import pytest
import torch

import msdda_fast as mf
from msdda_fast import resume
from msdda_fast.adapters.variant import Variant
from msdda_fast.pipelines.identity import base_digest, model_identity


@pytest.fixture(scope="module")
def pipe(tiny):
    return tiny.load()


def differences(old, new):
    try:
        resume.require_same("here", old, new)
    except mf.errors.ResumeMismatch as error:
        return str(error)
    return ""


@pytest.fixture
def identity(pipe):
    return model_identity(pipe)


def first(network, text):
    return next(p for name, p in network.named_parameters() if text in name)


@pytest.mark.parametrize(
    ("part", "tensor", "field"),
    [
        ("unet", "conv_in.weight", "model.unet"),
        ("unet", "to_q.base_layer.weight", "model.unet"),
        ("unet", "to_q.lora_A.warm", "objectives.warm.adapter"),
        ("unet", "to_q.lora_B.cool", "objectives.cool.adapter"),
        ("vae", "decoder", "model.vae"),
        ("text_encoder", "embedding", "model.text_encoder"),
    ],
)
def test_one_number_of_any_network(pipe, identity, part, tensor, field):
    parameter = first(getattr(pipe, part), tensor)
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3
        changed = model_identity(pipe)
        parameter.copy_(kept)
    found = differences(identity, changed)
    assert f"otherwise: {field} was" in found and ";" not in found
    assert model_identity(pipe) == identity


def test_settings_of_objectives_and_scheduler(pipe, identity):
    objectives, variants = pipe.objectives, pipe.variants
    for changed, field in (
        ({"eta": 0.5}, "objectives.warm.eta was 1.0, is 0.5"),
        ({"guidance_scale": 2.0}, "objectives.warm.guidance_scale was None, is 2.0"),
    ):
        pipe.set_objectives(objectives | {"warm": replace(objectives["warm"], **changed)}, variants)
        assert field in differences(identity, model_identity(pipe))
    scaled = variants | {"warm": replace(variants["warm"], scale=0.5)}
    pipe.set_objectives(objectives, scaled)
    assert "objectives.warm.adapter was" in differences(identity, model_identity(pipe))
    own = variants | {"warm": Variant(copy.deepcopy(pipe.unet), "warm")}
    pipe.set_objectives(objectives, own)
    assert "objectives.warm.network was None" in differences(identity, model_identity(pipe))
    pipe.set_objectives(objectives, variants)
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    found = differences(identity, model_identity(pipe))
    assert "scheduler.timestep_spacing was 'leading', is 'trailing'" in found
    pipe.scheduler = scheduler
    assert model_identity(pipe) == identity


def test_alpha_is_part_of_an_adapter_though_no_tensor_holds_it(pipe, identity):
    layer = next(m for m in pipe.unet.modules() if hasattr(m, "lora_alpha"))
    kept = layer.lora_alpha["cool"]
    layer.lora_alpha["cool"] = 2 * kept
    found = differences(identity, model_identity(pipe))
    layer.lora_alpha["cool"] = kept
    assert "objectives.cool.adapter was" in found and ";" not in found


def test_what_changes_no_image_changes_no_identity(tiny, pipe, identity):
    pipe.set_forward("sequential")
    pipe("a red dog", weights={"warm": 0.5, "cool": 0.5}, num_inference_steps=1, seed=0)
    assert model_identity(pipe) == identity == model_identity(tiny.load())
    bare = mf.MSDDAPipeline.from_pretrained(tiny.folder, objectives={"b": mf.Objective.base()})
    assert base_digest(bare.unet) == base_digest(pipe.unet) == identity["model"]["unet"]


def test_dtype_and_words(tiny, identity):
    half = tiny.load(dtype=torch.bfloat16)
    found = differences(identity, model_identity(half) | {"model": identity["model"]})
    assert "dtype was 'float32', is 'bfloat16'" in found
    other = tiny.load()
    other.tokenizer.model_max_length = 5
    assert "model.tokenizer was" in differences(identity, model_identity(other))

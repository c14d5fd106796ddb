# SPDX-License-Identifier: Apache-2.0
"""Objectives of a pipeline with a loop of its own, here image to image: names, sets, folders."""

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import msdda_fast as mf
from tests.tiny_model import quiet


@pytest.fixture(scope="module")
def stock(tiny):
    """With the adapters "warm" and "cool"."""
    return quiet(StableDiffusionImg2ImgPipeline(**tiny.load().components))


def draw(pipe, **options):
    request = dict(strength=1.0, num_inference_steps=3, output_type="latent", seed=0)
    image = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    return pipe("a red dog", image=image, **request, **options).images


def test_an_objective_without_a_source_is_the_adapter_of_its_name(stock):
    named = {name: mf.Objective(name, scale=0.5) for name in ("warm", "cool")}
    alone = {name: mf.Objective(scale=0.5) for name in ("warm", "cool")}
    expected = draw(mf.MSDDAPipeline.from_pipe(stock, objectives=named), weights=[0.3, 0.7])
    pipe = mf.MSDDAPipeline.from_pipe(stock, objectives=alone)
    assert torch.equal(draw(pipe, weights=[0.3, 0.7]), expected)
    base = mf.MSDDAPipeline.from_pipe(stock, objectives={"plain": mf.Objective.base()})
    assert not torch.allclose(draw(base), expected, atol=0.1)


def test_a_set_is_saved_as_one_adapter_and_a_scale_as_it_is(stock, tmp_path):
    objectives = {
        "both": mf.Objective(["warm", "cool"], scale=[0.5, 2.0]),
        "half": mf.Objective(["warm"], scale=[0.5]),
    }
    pipe = mf.MSDDAPipeline.from_pipe(stock, objectives=objectives)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(mf.MSDDAPipeline.from_pretrained(tmp_path))
    assert {name: one.scale for name, one in loaded.objectives.items()} == {
        "both": 1.0,
        "half": 0.5,
    }
    for weights in ([1, 0], [0, 1], [0.3, 0.7]):
        expected = draw(pipe, weights=weights)
        error = (draw(loaded, weights=weights) - expected).abs().max()
        assert error < 2e-5 * expected.abs().max()  # the factors of a set are summed at once

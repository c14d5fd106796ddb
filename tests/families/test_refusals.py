# SPDX-License-Identifier: Apache-2.0
"""What a stock pipeline with objectives refuses, by name, before a network runs."""

import diffusers
import pytest
import torch

import msdda_fast as mf
from msdda_fast.errors import (
    InvalidSchedule,
    InvalidShape,
    InvalidWeights,
    UnknownObjective,
    UnsupportedNetwork,
)
from tests.families import images, xl
from tests.families.lockstep import draw, made, quiet
from tests.families.test_pipelines import W


def asleep(make=images.sd3, objectives=None, scheduler=None):
    """A pipeline whose networks must not run, and its call."""
    stock, call = made(make)
    if scheduler is not None:
        stock.scheduler = scheduler(stock.scheduler)
    pipe = mf.MSDDAPipeline.from_pipe(stock, objectives=objectives)

    def runs(*_):
        raise AssertionError("a network ran")

    for network in pipe.shared_networks():
        network.register_forward_pre_hook(runs)
    return pipe, call


@pytest.fixture(autouse=True)
def awake():
    yield
    for make in (images.sd3, xl.text):
        for network in made(make)[0].components.values():
            if isinstance(network, torch.nn.Module):
                network._forward_pre_hooks.clear()


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"weights": {"a": 1.0}}, InvalidWeights, "miss b"),
        ({"weights": {"a": 0.5, "c": 0.5}}, UnknownObjective, "c"),
        ({"weights": [0.5, 0.6]}, InvalidWeights, "1"),
        ({"weights": [1.5, -0.5]}, InvalidWeights, "extrapolate"),
        ({"weights": [1.0]}, InvalidShape, "2"),
        ({"weights": torch.ones(3, 2) / 2}, InvalidShape, "3"),
        ({"levels": {"c": 0.5}}, UnknownObjective, "'c'.*known: a, b"),
        ({"levels": [mf.FlowSDE(0.7)]}, InvalidShape, "1 levels for 2 objectives"),
        ({"levels": mf.FlowSDE(0.7)}, InvalidShape, "expected one for each objective"),
        ({"num_inference_steps": 0}, InvalidSchedule, "must be a positive integer, got 0"),
        ({"num_inference_steps": 2.5}, InvalidSchedule, "must be a positive integer, got 2.5"),
        ({"levels": {"a": mf.FlowSDE(0.7)}}, InvalidSchedule, "'b' was aligned without noise"),
        ({"levels": [mf.FlowSDE(0.7), mf.CPS(0.7)]}, InvalidSchedule, "kind"),
        ({"levels": [2.0, 0.5]}, InvalidSchedule, "2"),
        ({"seed": [1, 2, 3]}, InvalidShape, "3"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed or generator, not both"),
        ({"sigmas": [1.5, 1.0], "levels": [mf.FlowSDE(0.7)] * 2}, InvalidSchedule, r"\[0, 1\]"),
        ({"eta": 0.5}, TypeError, "eta"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, ValueError, "joint_attention_kwargs.*scale"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments(given, kind, message):
    pipe, call = asleep()
    given = {"weights": W, "num_inference_steps": 2, **given}
    with pytest.raises(kind, match=message):
        pipe(**call, **given)


def test_a_scale_of_1_is_that_of_the_objectives():
    pipe, call = made(images.sd3)
    pipe = mf.MSDDAPipeline.from_pipe(pipe)
    got = draw(pipe, call, weights=W, joint_attention_kwargs={"scale": 1.0})
    assert torch.equal(got, draw(pipe, call, weights=W))


def test_levels_of_another_kind():
    pipe, call = asleep(xl.text)
    with pytest.raises(InvalidSchedule, match="EulerAncestral"):
        pipe(**call, weights=W, levels=[mf.FlowSDE(0.7)] * 2)


@pytest.mark.parametrize(
    ("make", "scheduler", "message"),
    [
        pytest.param(
            xl.text,
            lambda old: diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False),
            "variance_type",
            id="learned variances",
        ),
        pytest.param(
            xl.text,
            lambda old: diffusers.DDIMScheduler(clip_sample=True),
            "clip_sample",
            id="clipping",
        ),
        pytest.param(
            xl.text,
            lambda old: diffusers.DPMSolverMultistepScheduler(thresholding=True),
            "thresholding",
            id="thresholding",
        ),
        pytest.param(
            xl.text, lambda old: diffusers.VQDiffusionScheduler(4), "linear", id="not linear"
        ),
    ],
)
def test_schedulers(make, scheduler, message):
    pipe, call = asleep(make, scheduler=scheduler)
    with pytest.raises(InvalidSchedule, match=message):
        pipe(**call, weights=W)


class Silent(diffusers.DiffusionPipeline):
    """Its loop does not step."""

    def __init__(self, scheduler, transformer, painter):
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer, painter=painter)

    def __call__(self, prompt_embeds=None, num_inference_steps=2):
        return None


def test_pipelines_without_denoiser_or_scheduler():
    transformer, scheduler = (images.sd3()[0].components[n] for n in ("transformer", "scheduler"))
    with pytest.raises(UnsupportedNetwork, match=r"no denoiser that is known.*painter"):
        mf.MSDDAPipeline.from_pipe(Silent(scheduler, None, transformer))
    with pytest.raises(UnsupportedNetwork, match="no scheduler"):
        mf.MSDDAPipeline.from_pipe(Silent(None, transformer, None))
    pipe = mf.MSDDAPipeline.from_pipe(Silent(scheduler, transformer, None))
    with pytest.raises(UnsupportedNetwork, match="did not call its scheduler's step"):
        pipe(weights=W)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (mf.Objective("a", guidance_scale=3.0), "'x' has a guidance_scale of its own"),
        (mf.Objective(unet="somewhere"), "'x' is a network of its own"),
    ],
    ids=["guidance", "network"],
)
def test_objectives_that_only_stable_diffusion_runs(objective, message):
    with pytest.raises(ValueError, match=message):
        mf.MSDDAPipeline.from_pipe(images.sd3()[0], objectives={"x": objective})


def test_noise_of_flow_models_on_stable_diffusion(tiny):
    pipe = tiny.only(mf.Objective("warm", noise=mf.FlowSDE(0.7)))
    with pytest.raises(InvalidSchedule, match=r"FlowSDE|flow"):
        quiet(pipe)("a red dog", num_inference_steps=2)

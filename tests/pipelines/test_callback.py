# SPDX-License-Identifier: Apache-2.0
"""Callbacks that diffusers ships or documents act on ours as on stock pipelines."""

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

import msdda_fast as mf
from tests.tiny_model import quiet

CALL = dict(num_inference_steps=4, guidance_scale=3.0, output_type="latent")
CUTOFF = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
FORWARDS = ["batched", "sequential"]


def tutorial(pipe, k, t, tensors):
    """diffusers' guide to callbacks, "dynamic classifier-free guidance"."""
    if k == int(pipe.num_timesteps * 0.4):
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        pipe._guidance_scale = 0.0
    return tensors


def rising(pipe, k, t, tensors):
    assert pipe.guidance_scale == 3.0 + k and pipe.do_classifier_free_guidance
    pipe._guidance_scale += 1.0
    return tensors


CASES = {
    "cutoff": (CUTOFF, ["latents"]),
    "several": (MultiPipelineCallbacks([CUTOFF]), ["latents"]),
    "tutorial": (tutorial, ["prompt_embeds"]),
    "rising": (rising, ["latents"]),
}


def close(actual, expected):
    return (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("case", CASES)
def test_guidance_that_a_callback_changes_is_that_of_stock(tiny, forward, case):
    function, names = CASES[case]
    looks = dict(callback_on_step_end=function, callback_on_step_end_tensor_inputs=names)
    stock = tiny.stock("warm")
    expected = stock("a red dog", generator=torch.manual_seed(0), eta=1.0, **CALL, **looks).images
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
    pipe.set_forward(forward)
    one_hot = {"warm": 1, "cool": 0}

    def draw(**options):
        generator = torch.manual_seed(0)
        return pipe("a red dog", generator=generator, weights=one_hot, **CALL, **options).images

    assert close(draw(**looks), expected)
    assert not close(draw(), expected)  # the next call begins anew


@pytest.mark.parametrize("forward", FORWARDS)
def test_every_objective_loses_its_guidance_at_the_cutoff(tiny, forward):
    """Against the steps after it taken by a call without guidance."""
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
    pipe.set_forward(forward)
    states = []

    def keep(pipe, k, t, tensors):
        states.append(tensors["latents"])
        return CUTOFF(pipe, k, t, tensors)

    looks = dict(callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    call = {**CALL, "seed": 2, "guidance_scale": {"warm": 3.0, "cool": 5.0}}
    prompts = ["a red dog", "a blue cat"]
    x_0 = pipe(prompts, **call, **looks, callback_on_step_end=keep).images

    def jump(pipe, k, t, tensors):
        return {"latents": states[1]} if k == 1 else None

    call["guidance_scale"] = 1.0
    assert close(x_0, pipe(prompts, **call, callback_on_step_end=jump).images)


def test_x0_clipping_loses_its_guidance_too():
    from msdda_fast.steps.table import coefficient_table
    from tests.gaussian_world import sd15_scheduler

    scheduler = sd15_scheduler(clip_sample=True)
    build = dict(etas=[0.8, 1.0], weights=[0.3, 0.7], dtype=torch.float64)
    table = coefficient_table(scheduler, 5, guidance_scale=[3.0, 7.5], **build)
    for scale in (1.0, 4.0):
        expected = coefficient_table(scheduler, 5, guidance_scale=scale, **build)
        guided = table.guided(scale)
        assert torch.allclose(guided.rows, expected.rows, rtol=1e-12, atol=1e-12)
        assert guided.needs_uncond == expected.needs_uncond == (scale > 1)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("shape", ["(B, L, D)", "(1, B, L, D)", "(2B, L, D)"])
def test_embeddings_in_shapes_of_diffusers_serve_all_objectives(tiny, forward, shape):
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
    pipe.set_forward(forward)
    prompts = ["a red dog", "a blue cat"]
    cond, uncond = pipe.encode_prompt(["a blue dog", "a red cat"], "cpu", 1, True)
    given = {"(B, L, D)": cond, "(1, B, L, D)": cond[None]}
    uncond = uncond.flip(1)
    given["(2B, L, D)"] = torch.cat([uncond, cond])
    own = {"prompt_embeds": cond.expand(2, -1, -1, -1)}
    if shape == "(2B, L, D)":
        own["negative_prompt_embeds"] = uncond.expand(2, -1, -1, -1)
    call = {**CALL, "seed": 1}
    expected = pipe(prompts, **call, callback_on_step_end=lambda *_: own).images
    changed = lambda *_: {"prompt_embeds": given[shape]}  # noqa: E731
    assert pipe(prompts, **call, callback_on_step_end=changed).images.equal(expected)
    assert not close(expected, pipe(prompts, **call).images)


@pytest.mark.parametrize(
    "returned, error, message",
    [
        ({"prompt_embeds": torch.zeros(3, 24, 16)}, mf.InvalidShape, r"\(3, 24, 16\).*\(2, 1, 24"),
        ({"negative_prompt_embeds": torch.zeros(5)}, mf.InvalidShape, r"negative.*\(5,\)"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, mf.InvalidShape, r"latents.*\(1, 4, 4, 4\)"),
        ({"latents": None}, mf.InvalidShape, "returned latents None, expected a tensor"),
        (5, mf.InvalidShape, "returned 5, expected None or tensors by name"),
    ],
    ids=["prompt", "negative", "latents", "no tensor", "no names"],
)
def test_other_shapes_are_refused_by_name(pipe, returned, error, message):
    with pytest.raises(error, match=message):
        pipe("a red dog", **CALL, callback_on_step_end=lambda *_: returned)


def test_guidance_cannot_be_added_to_a_call_without(pipe):
    def add(pipe, k, t, tensors):
        pipe._guidance_scale = 2.0

    with pytest.raises(mf.InvalidSchedule, match=r"guidance scale to 2.*without guidance"):
        pipe("a red dog", **{**CALL, "guidance_scale": 1.0}, callback_on_step_end=add)


def test_what_cannot_be_called_is_refused(pipe):
    with pytest.raises(ValueError, match="callback_on_step_end must be callable, got 5"):
        pipe("a red dog", **CALL, callback_on_step_end=5)

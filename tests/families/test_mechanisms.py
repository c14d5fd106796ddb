# SPDX-License-Identifier: Apache-2.0
"""What runs all objectives in one forward, what cannot, and what is said then."""

import functools
import inspect
import logging

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import nn

import msdda_fast as mf
from msdda_fast.errors import UnsupportedNetwork
from tests.families import images, xl
from tests.families.encoders import with_encoders
from tests.families.lockstep import draw, equal_levels, lockstep, quiet
from tests.families.parts import JOINT_ATTENTION
from tests.families.test_pipelines import W, assert_close, attached

A, B = {"a": 1.0}, {"b": 1.0}
WEIGHTS = torch.tensor([[0.3, 0.7]] * 2, dtype=torch.float64)


@pytest.fixture
def said(caplog):
    """Messages of the package so far."""
    caplog.set_level(logging.INFO, "msdda_fast")
    return lambda: [r.message for r in caplog.records if r.name.startswith("msdda_fast")]


def two_adapters(make, kind=LoraConfig, **options):
    """The pipeline of `make`, with other adapters "a" and "b"."""
    random = "init_lora_weights" if kind is LoraConfig else "init_weights"

    def changed():
        pipe, call = make()
        network = pipe.transformer
        network.delete_adapters(["a", "b"])
        for index, name in enumerate("ab"):
            torch.manual_seed(100 + index)
            config = kind(
                r=4 + index, target_modules=list(JOINT_ATTENTION), **{random: False}, **options
            )
            inject_adapter_in_model(config, network, name)
        with torch.no_grad():
            for path, parameter in network.named_parameters():
                if "lora_magnitude" in path:
                    parameter.mul_(1.2)
                elif "lora_B" in path and path.endswith("bias"):
                    parameter.normal_()
        return pipe, call

    return changed


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"use_dora": True}, id="DoRA"),
        pytest.param({"lora_bias": True}, id="bias"),
        pytest.param({"use_rslora": True}, id="rank-stabilised"),
        pytest.param({"rank_pattern": {"to_q": 7}, "alpha_pattern": {"to_k": 3}}, id="patterns"),
        pytest.param({"kind": LoKrConfig}, id="LoKr"),
        pytest.param({"kind": LoHaConfig}, id="LoHa"),
    ],
)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_adapters_of_every_kind(config, said):
    make = two_adapters(images.sd3, **config)
    pipe, call = attached(make)
    got = draw(pipe, call, weights=W)
    assert not said()
    assert_close(got, lockstep(make, [A, B], equal_levels(WEIGHTS)))
    assert not torch.allclose(got, draw(pipe, call, weights=[1, 0]), rtol=0.05)


@pytest.mark.parametrize("family", [xl.text, images.sd3, images.flux], ids=["XL", "SD3", "FLUX"])
def test_adapters_of_text_encoders(family, said):
    make = functools.partial(with_encoders, family)
    pipe, call = attached(make)
    got = draw(pipe, call, weights=W)
    assert not said()
    assert_close(got, lockstep(make, [A, B], equal_levels(WEIGHTS)))

    def without():
        pipe, call = make()
        for name in ("text_encoder", "text_encoder_2"):
            if hasattr(encoder := getattr(pipe, name), "peft_config"):
                encoder.delete_adapter(["a", "b"])
        return pipe, call

    other, call = attached(without)
    assert not torch.allclose(got, draw(other, call, weights=W), rtol=0.05)


class Crossed(diffusers.SD3Transformer2DModel):
    """One whose rows are not independent: each sees another."""

    def forward(self, hidden_states, *args, **kwargs):
        (out,) = super().forward(hidden_states, *args, **kwargs)
        return (out + 0.3 * out.flip(0),)


def crossed():
    pipe, call = images.sd3()
    pipe.transformer.__class__ = Crossed
    return pipe, call


def test_a_network_that_mixes_rows_runs_objective_by_objective(said):
    pipe, call = attached(crossed)
    got = draw(pipe, call, weights=W)
    draw(pipe, call, weights=W)
    (message,) = said()  # once
    assert "transformer (Crossed)" in message and "one after another" in message
    assert_close(got, lockstep(crossed, [A, B], equal_levels(WEIGHTS)))


def test_perturbed_attention_runs_objective_by_objective(said):
    """Its processors take parts of the rows for branches of guidance."""

    def make():
        pipe, call = images.sd3()
        taken = inspect.signature(diffusers.StableDiffusion3PAGPipeline.__init__).parameters
        parts = {name: part for name, part in pipe.components.items() if name in taken}
        made = diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
        return made, {**call, "pag_scale": 2.0}

    pipe, call = attached(make)
    got = draw(pipe, call, weights=W)
    (message,) = said()
    assert "one after another" in message
    assert_close(got, lockstep(make, [A, B], equal_levels(WEIGHTS)))


def test_a_cache_is_refused():
    pipe, call = attached(images.flux)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(UnsupportedNetwork, match=r"'transformer'.*disable_cache\(\)"):
        draw(pipe, call, weights=W)
    pipe.transformer.disable_cache()
    draw(pipe, call, weights=W)


def test_reading_a_prediction_on_the_host_is_refused():
    class Reads(diffusers.StableDiffusion3Pipeline):
        """Its loop decides by a number of a prediction."""

        def __init__(self, scheduler, transformer):
            self.register_modules(scheduler=scheduler, transformer=transformer)

        def __call__(self, prompt_embeds, pooled_prompt_embeds, latents, num_inference_steps=2):
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                out = self.transformer(
                    hidden_states=latents,
                    timestep=t.expand(len(latents)),
                    encoder_hidden_states=prompt_embeds,
                    pooled_projections=pooled_prompt_embeds,
                ).sample
                if out.abs().max() > 1e9:
                    break
                latents = self.scheduler.step(out, t, latents).prev_sample
            return latents

    stock, call = images.sd3()
    pipe = mf.MSDDAPipeline.from_pipe(quiet(Reads(stock.scheduler, stock.transformer)))
    given = {name: call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    with pytest.raises(UnsupportedNetwork, match="reads a prediction on the host"):
        pipe(**given, latents=torch.randn(2, 4, 8, 8), weights=W)
    assert torch.isfinite(pipe(**given, latents=torch.randn(2, 4, 8, 8), weights=[1, 0])).all()


@pytest.mark.full
def test_compiled_networks():
    pipe, call = attached()
    expected = draw(pipe, call, weights=W)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", dynamic=False)
    assert isinstance(pipe.transformer, nn.Module)
    assert_close(draw(pipe, call, weights=W), expected)


class TestCosts:
    def test_what_no_objective_changes_runs_once_for_all(self):
        """ControlNet and autoencoder; the denoiser runs once a step, on the rows of both."""
        pipe, call = attached(xl.controlnet)
        draw(pipe, call, weights=W)  # checks the rows
        parts = {"unet": pipe.unet.conv_in, "controlnet": pipe.controlnet, "vae": pipe.vae.decoder}
        ran = {name: [] for name in parts}
        for name, part in parts.items():
            note = lambda *given, kept=ran[name]: kept.append(len(given[1][0]))  # noqa: E731
            part.register_forward_hook(note)
        draw(pipe, call, weights=W, output_type="pt")
        images = len(call["prompt_embeds"])
        rows = 2 * images  # guidance
        assert ran == {"unet": [2 * rows] * 3, "controlnet": [rows] * 3, "vae": [images]}

    def test_texts_are_encoded_once(self):
        pipe, call = attached(functools.partial(with_encoders, xl.text))
        for encoder in (pipe.text_encoder, pipe.text_encoder_2):
            if hasattr(encoder, "peft_config"):
                encoder.delete_adapter(["a", "b"])
        ran = []
        pipe.text_encoder.register_forward_hook(lambda *given: ran.append(given))
        draw(pipe, call, weights=W)
        both, ran[:] = len(ran), []
        draw(pipe, call, weights=[1, 0])
        assert both == len(ran) == 1

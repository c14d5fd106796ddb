# SPDX-License-Identifier: Apache-2.0
"""A stock pipeline with objectives stays the stock pipeline: its class, parts and placement."""

import inspect
import logging

import diffusers
import pytest
import torch
from accelerate import cpu_offload

import msdda_fast as mf
from msdda_fast.errors import AdapterMismatch, UnknownObjective
from msdda_fast.pipelines.attach import WithObjectives
from tests.families import images, xl
from tests.families.lockstep import draw, quiet, use

W = {"a": 0.3, "b": 0.7}


def attached(make=images.sd3, **options):
    pipe, call = make()
    return quiet(mf.MSDDAPipeline.from_pipe(pipe, **options)), call


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 5e-6 * expected.abs().max()


class TestClass:
    @pytest.mark.parametrize("make", [images.sd3, xl.img2img])
    def test_it_is_of_the_stock_class(self, make):
        stock, _ = make()
        pipe = mf.MSDDAPipeline.from_pipe(stock)
        assert isinstance(pipe, type(stock)) and isinstance(pipe, WithObjectives)
        assert not isinstance(pipe, mf.MSDDAPipeline)
        for name in ("__name__", "__qualname__", "__module__"):
            assert getattr(type(pipe), name) == getattr(type(stock), name)
        own = inspect.signature(type(stock).__call__).parameters
        taken = inspect.signature(type(pipe).__call__).parameters
        assert [name for name in taken if name in own] == list(own)
        assert {*taken} - {*own} == {
            *("weights", "seed", "levels", "etas", "zero_variance", "rates"),
            *("extrapolate", "fusion", "objective_strength", "kl_weights"),
            *("masks", "mask_softness"),
        }
        assert type(stock) is not type(pipe) and dict(stock.components) == dict(pipe.components)

    def test_stable_diffusion_1_and_2_have_their_own(self, tiny):
        stock = tiny.stock("warm")
        assert type(mf.MSDDAPipeline.from_pipe(stock)) is mf.MSDDAPipeline
        image = diffusers.StableDiffusionImg2ImgPipeline(**stock.components)
        pipe = mf.MSDDAPipeline.from_pipe(image)
        assert isinstance(pipe, diffusers.StableDiffusionImg2ImgPipeline)
        assert list(pipe.objectives) == ["warm"]

    def test_detach_returns_the_stock_pipeline(self):
        pipe, call = attached()
        before = draw(pipe, call, weights=W)
        stock = pipe.detach()
        assert type(stock) is diffusers.StableDiffusion3Pipeline
        assert stock.transformer is pipe.transformer and stock.scheduler is pipe.scheduler
        use(stock, {"a": 1.0})
        expected = draw(stock, call)
        assert torch.equal(draw(pipe, call, weights=[1, 0]), expected)
        assert torch.equal(draw(pipe, call, weights=W), before)
        assert torch.equal(draw(stock, call), expected)  # the call left it as it was

    def test_from_pipe_again_takes_the_objectives_along(self):
        pipe, call = attached(objectives={"x": mf.Objective("b", scale=0.5)})
        again = quiet(mf.MSDDAPipeline.from_pipe(pipe))
        assert again.objectives == pipe.objectives and type(again) is type(pipe)
        assert torch.equal(draw(again, call), draw(pipe, call))

    def test_a_source_may_be_the_objectives_own_name(self):
        pipe, _ = attached(objectives={"b": mf.Objective(scale=0.5), "other": mf.Objective()})
        assert pipe.adapter_sets == {"b": (("b", 0.5),), "other": ()}

    def test_from_pipe_takes_no_changes(self):
        with pytest.raises(ValueError, match="as it is"):
            attached(dtype=torch.bfloat16)

    def test_sources_are_loaded_adapters(self):
        with pytest.raises(UnknownObjective, match=r"'c' is not an adapter.*loaded: a, b"):
            attached(objectives={"x": mf.Objective("c")})

    @pytest.mark.parametrize(
        "name",
        [
            *("load_lora_weights", "unload_lora_weights", "set_adapters", "delete_adapters"),
            *("enable_lora", "disable_lora", "fuse_lora", "unfuse_lora"),
        ],
    )
    def test_methods_that_change_adapters_are_refused(self, name):
        with pytest.raises(AdapterMismatch, match=rf"{name}\(\) would change"):
            getattr(attached()[0], name)("a")

    def test_changes_to_the_networks_adapters(self):
        pipe, call = attached()
        before = draw(pipe, call, weights=W)
        pipe.transformer.set_adapter("b")
        assert torch.equal(draw(pipe, call, weights=W), before)
        pipe.transformer.disable_adapters()
        assert torch.equal(draw(pipe, call, weights=W), before)
        pipe.transformer.fuse_lora(adapter_names=["a"])
        with pytest.raises(AdapterMismatch, match="unfuse_lora"):
            draw(pipe, call, weights=W)
        pipe.transformer.unfuse_lora()
        pipe.transformer.delete_adapters("a")
        with pytest.raises(AdapterMismatch, match="'a' is no longer in the pipeline; loaded: b"):
            draw(pipe, call, weights=W)

    def test_new_numbers_in_an_adapter_count_from_the_next_call(self):
        pipe, call = attached()
        draw(pipe, call, weights=W)
        layer = pipe.transformer.transformer_blocks[0].attn.to_q
        with torch.no_grad():
            layer.lora_B["a"].weight.mul_(3)
        fresh = quiet(mf.MSDDAPipeline.from_pipe(pipe))
        assert torch.equal(draw(pipe, call, weights=W), draw(fresh, call, weights=W))


class TestParts:
    def test_another_scheduler_is_followed(self):
        pipe, call = attached(xl.text)
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        other, _ = xl.text()
        other.scheduler = pipe.scheduler
        fresh = quiet(mf.MSDDAPipeline.from_pipe(other))
        assert torch.equal(draw(pipe, call, weights=W), draw(fresh, call, weights=W))
        assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler

    def test_another_network_is_followed(self):
        pipe, call = attached()
        before = draw(pipe, call, weights=W)
        other, _ = images.sd3()
        with torch.no_grad():
            for parameter in other.transformer.parameters():
                parameter.mul_(1.1)
        pipe.transformer = other.transformer
        after = draw(pipe, call, weights=W)
        assert torch.equal(after, draw(mf.MSDDAPipeline.from_pipe(quiet(other)), call, weights=W))
        assert not torch.equal(after, before)

    def test_to_another_dtype(self):
        pipe, call = attached()
        draw(pipe, call, weights=W)
        assert pipe.to(torch.float64) is pipe
        call = {k: v.double() if torch.is_tensor(v) else v for k, v in call.items()}
        got = draw(pipe, call, weights=W)
        expected = quiet(mf.MSDDAPipeline.from_pipe(pipe.detach()))
        assert got.dtype == torch.float64 and torch.equal(got, draw(expected, call, weights=W))

    @pytest.mark.parametrize("kind", ["group", "group leaves", "model", "sequential"])
    def test_offloading(self, kind, caplog):
        """As far as a machine without accelerators runs it: to the processor itself."""
        pipe, call = attached()
        expected = draw(pipe, call, weights=W)
        cpu = torch.device("cpu")
        if kind == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        elif kind == "sequential":
            # as pipe.enable_sequential_cpu_offload(), which takes no processor: weights are on
            # "meta" but while their own layer runs
            for network in (pipe.transformer, pipe.vae):
                cpu_offload(network, cpu)
        elif kind == "group":
            pipe.transformer.enable_group_offload(
                onload_device=cpu, offload_type="block_level", num_blocks_per_group=1
            )
        else:
            pipe.transformer.enable_group_offload(onload_device=cpu, offload_type="leaf_level")
        with caplog.at_level(logging.WARNING, "msdda_fast"):
            assert_close(draw(pipe, call, weights=W), expected)
            assert_close(draw(pipe, call, weights=W), expected)
        said = [record.message for record in caplog.records]
        assert len(said) == (kind == "sequential") and all("are loaded" in one for one in said)

    def test_tiled_decoding(self):
        pipe, call = attached()
        latents = draw(pipe, call, weights=W, seed=0)
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size = 8
        pipe.vae.tile_latent_min_size = 4
        shown = draw(pipe, call, weights=W, seed=0, output_type="pt")
        scaled = latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)
        expected = (pipe.vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1)
        assert_close(shown, expected)

# SPDX-License-Identifier: Apache-2.0
"""What is done to a pipeline's network after loading has the effect it has in stock diffusers."""

import copy
import logging

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from torch import nn

import msdda_fast as mf
from msdda_fast.errors import UnsupportedNetwork
from tests.tiny_model import quiet, small_unet

PROMPTS = ["a red dog", "a blue cat"]
SHORT = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")


@pytest.fixture
def stock(tiny):
    """Of this test alone."""
    return quiet(StableDiffusionPipeline(**copy.deepcopy(tiny.stock().components)))


@pytest.fixture
def ours(stock):
    """On the modules of `stock`; the batched forward is built."""
    pipe = quiet(mf.MSDDAPipeline(**stock.components, requires_safety_checker=False))
    draw(pipe)
    return pipe


def draw(pipe, **request):
    request = {"generator": torch.Generator().manual_seed(0), **SHORT, **request}
    if type(pipe) is StableDiffusionPipeline:
        request["eta"] = 1.0
    return pipe(PROMPTS, **request).images


def assert_close(actual, expected):
    assert (actual - expected).norm() < 1e-3 * expected.norm()


def differ(one, other):
    return (one - other).norm() > 1e-2 * other.norm()


class Halved(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 0.5 * super().__call__(*args, **kwargs)


class Halving(nn.Conv2d):
    def forward(self, x):
        return 0.5 * super().forward(x)


def patch_forward(unet):  # as DeepCache and HyperTile do
    forward = unet.mid_block.forward
    unet.mid_block.forward = lambda *args, **kwargs: 0.5 * forward(*args, **kwargs)


def change_class(unet):  # as token merging does
    unet.conv_out.__class__ = Halving


def halve_first(module, args, kwargs):
    return (0.5 * args[0], *args[1:]), kwargs


def load_state(unet):
    unet.load_state_dict({key: 0.9 * value for key, value in unet.state_dict().items()})


def compile_in_place(unet):  # one layer: it takes a second
    unet.mid_block.resnets[0].compile(
        backend=lambda graph, inputs: lambda *args: [0.5 * y for y in graph(*args)]
    )


def replace_layer(unet):
    unet.conv_out = nn.Sequential(unet.conv_out, nn.Tanh())


#: Followed by the batched forward.
FOLLOWED = {
    "written through data": lambda unet: unet.conv_out.weight.data.mul_(0.5),
    "data replaced": lambda unet: setattr(unet.conv_in.weight, "data", -unet.conv_in.weight.data),
    "load_state_dict": load_state,
}
#: Run by the network itself; the message of a forward that must be batched.
RUN_BY_ITSELF = {
    "freeu": (lambda unet: unet.enable_freeu(s1=0.1, s2=0.2, b1=1.8, b2=1.9), "FreeU"),
    "processor": (lambda unet: unet.set_attn_processor(Halved()), "processor Halved"),
    "patched forward": (patch_forward, "mid_block: a patched forward"),
    "hook": (
        lambda unet: unet.conv_in.register_forward_hook(lambda module, args, out: 0.5 * out),
        "conv_in: a forward hook",
    ),
    "hook with keywords": (
        lambda unet: unet.register_forward_pre_hook(halve_first, with_kwargs=True),
        "the network: a forward hook",
    ),
    "another class": (change_class, "conv_out: a layer of the class Halving"),
    "another layer": (replace_layer, "conv_out: a layer of the class Sequential"),
    "compiled in place": (compile_in_place, "torch.compile"),
    "a number of a layer": (
        lambda unet: setattr(unet.mid_block.resnets[0], "output_scale_factor", 3.0),
        "output_scale_factor",
    ),
    "layerwise casting": (
        lambda unet: unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "layerwise casting",
    ),
}


@pytest.mark.parametrize("change", FOLLOWED.values(), ids=FOLLOWED)
def test_a_change_is_followed(stock, ours, change, calls):
    before = draw(stock)
    change(ours.unet)
    expected = draw(stock)
    assert differ(expected, before)
    calls.clear()
    assert_close(draw(ours), expected)
    assert not calls  # of the stock forward
    ours.set_forward("sequential")
    assert_close(draw(ours), expected)


@pytest.mark.parametrize(("change", "named"), RUN_BY_ITSELF.values(), ids=RUN_BY_ITSELF)
def test_a_changed_network_runs_by_itself(stock, ours, change, named, caplog):
    before = draw(stock)
    change(ours.unet)
    expected = draw(stock)
    assert differ(expected, before)
    with caplog.at_level(logging.WARNING, logger="msdda_fast"):
        for _ in range(2):
            assert_close(draw(ours), expected)
    told = [record.message for record in caplog.records if record.name.startswith("msdda_fast")]
    assert len(told) == 1 and "one after another" in told[0] and named in told[0]
    with pytest.raises(UnsupportedNetwork, match=named):
        draw(ours, mode="merged")
    ours.set_forward("batched")
    with pytest.raises(UnsupportedNetwork, match=named):
        draw(ours)


def test_autocast_is_that_of_stock(stock, ours, caplog):
    before = draw(stock)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = draw(stock), draw(ours)
    assert (expected - before).norm() > 2e-3 * before.norm()  # half of it would be noticed
    assert_close(got, expected)
    assert "torch.autocast is on for cpu" in caplog.text
    assert_close(draw(ours), before)


def test_what_is_undone_is_batched_again(ours, calls):
    before = draw(ours)
    hook = ours.unet.conv_in.register_forward_hook(lambda module, args, out: 0.5 * out)
    assert differ(draw(ours), before)
    hook.remove()
    calls.clear()
    assert torch.equal(draw(ours), before) and not calls


def test_training_mode_and_slices_are_no_change(ours, calls):
    before = draw(ours)
    sampler = ours.networks().sampler
    ours.unet.train()
    assert ours.networks().sampler is sampler
    ours.unet.eval()
    for module in ours.unet.modules():
        if isinstance(module, Attention):
            module.set_processor(SlicedAttnProcessor(1))
    calls.clear()
    assert_close(draw(ours), before)
    assert not calls


class TestAnotherNetwork:
    @pytest.mark.parametrize("forward", ["auto", "sequential"])
    def test_is_the_one_that_runs(self, stock, ours, forward):
        ours.set_forward(forward)
        before = draw(ours)
        other = small_unet()
        for pipe in (stock, ours):
            pipe.unet = other
        expected = draw(stock)
        assert differ(expected, before)
        assert_close(draw(ours), expected)
        ours.register_modules(unet=copy.deepcopy(other))
        ours.unet.conv_out.weight.data.mul_(0.5)
        stock.unet = ours.unet
        assert_close(draw(ours), draw(stock))
        assert ours.variants["base"].network is ours.unet

    def test_may_be_compiled(self, ours, calls):
        before = draw(ours)
        calls.clear()
        ours.unet = torch.compile(ours.unet, backend="eager")
        with torch.compiler.set_stance("force_eager"):  # compiling it takes half a minute
            assert_close(draw(ours), before)
            assert len(calls) == 2
            own = {"own": mf.Objective(unet=ours.unet)}
            assert_close(draw(mf.MSDDAPipeline.from_pipe(ours, objectives=own)), before)
        assert len(calls) == 4

    def test_is_looked_up_for_the_adapters_of_objectives(self, tiny):
        pipe = tiny.load()
        weights = {"warm": 0.3, "cool": 0.7}
        before = draw(pipe, weights=weights)
        pipe.unet = copy.deepcopy(pipe.unet)
        assert_close(draw(pipe, weights=weights), before)
        pipe.unet.delete_adapters("warm")
        with pytest.raises(mf.AdapterMismatch, match=r"'warm'.*unet.*load_lora_weights"):
            draw(pipe, weights=weights)
        pipe.unet = small_unet()
        with pytest.raises(mf.AdapterMismatch, match="objective 'warm'"):
            draw(pipe, weights=weights)

    def test_leaves_objectives_with_networks_of_their_own_alone(self, tiny):
        own = small_unet()
        pipe = tiny.load(objectives={"own": mf.Objective(unet=own), "plain": mf.Objective()})
        alone = draw(pipe, weights=(1, 0))
        pipe.unet = small_unet()
        assert_close(draw(pipe, weights=(1, 0)), alone)
        assert pipe.variants["own"].network is own
        assert pipe.variants["plain"].network is pipe.unet


#: Settings of networks that need inputs which sampling does not have.
UNRUNNABLE = {
    "time_cond_proj_dim": 32,
    "encoder_hid_dim_type": "ip_image_proj",
    "addition_embed_type": "text_time",
    "class_embed_type": "timestep",
    "num_class_embeds": 3,
    "in_channels": 9,
}


@pytest.mark.parametrize(("field", "value"), UNRUNNABLE.items(), ids=UNRUNNABLE)
def test_networks_that_cannot_run_as_they_are(tiny, stock, ours, field, value):
    """Given to the constructor, `from_pipe`, an objective or the pipeline itself."""
    unet = small_unet()
    unet.register_to_config(**{field: value})
    named = {"in_channels": "9 channels"}.get(field, f"{field} is {value}")
    parts = {**stock.components, "unet": unet}
    with pytest.raises(UnsupportedNetwork, match=named):
        mf.MSDDAPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(UnsupportedNetwork, match=named):
        mf.MSDDAPipeline.from_pipe(StableDiffusionPipeline(**parts))
    with pytest.raises(UnsupportedNetwork, match=rf"'own'.*{named}"):
        mf.MSDDAPipeline.from_pipe(stock, objectives={"own": mf.Objective(unet=unet)})
    with pytest.raises(UnsupportedNetwork, match=named):
        tiny.load(unet=unet)
    ours.unet = unet
    with pytest.raises(UnsupportedNetwork, match=named):
        draw(ours)


def test_image_prompts_are_refused_by_name(ours):
    with pytest.raises(UnsupportedNetwork, match="IP-Adapters"):
        ours.load_ip_adapter("owner/ip-adapter")
    with pytest.raises(ValueError, match="image prompts"):
        draw(ours, ip_adapter_image=torch.zeros(1, 3, 8, 8))


def test_the_scale_of_stock_pipelines_is_refused_by_name(ours):
    with pytest.raises(ValueError, match=r"cross_attention_kwargs.*Objective\(\.\.\., scale"):
        draw(ours, cross_attention_kwargs={"scale": 0.5})


def test_hooks_of_all_modules_act(stock, ours):
    before = draw(ours)
    larger = lambda module, *_: _[-1] * 1.5 if isinstance(module, nn.Conv2d) else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(larger)
    try:
        got, expected = draw(ours), draw(stock)
    finally:
        handle.remove()
    assert torch.allclose(got, expected, atol=1e-4) and not torch.allclose(got, before, atol=0.1)
    assert torch.allclose(draw(ours), before, atol=1e-4)


def test_the_first_call_may_be_in_inference_mode(tiny):
    pipe = tiny.load()
    with torch.inference_mode():
        first = draw(pipe)
    assert torch.equal(draw(pipe), first) and not first.is_inference()

# SPDX-License-Identifier: Apache-2.0
"""diffusers' adapter methods on a pipeline with objectives, and adapters of every kind."""

import copy
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import (
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
)

import msdda_fast as mf
from msdda_fast.adapters.soup import average_networks
from tests.tiny_model import quiet, small_unet, write_adapter

PROMPTS = ["a red dog", "a blue cat"]
SHORT = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")
WARM = {"warm": 1, "cool": 0}


def draw(pipe, **request):
    request = {"generator": torch.Generator().manual_seed(0), **SHORT, **request}
    if type(pipe) is StableDiffusionPipeline:
        request["eta"] = 1.0
    return pipe(PROMPTS, **request).images


def assert_close(actual, expected):
    assert (actual - expected).norm() < 1e-3 * expected.norm()


def differ(one, other):
    return (one - other).norm() > 1e-2 * other.norm()


@pytest.fixture
def stock(tiny):
    """Of this test alone, with one adapter."""
    stock = quiet(StableDiffusionPipeline(**copy.deepcopy(tiny.stock().components)))
    stock.load_lora_weights(tiny.warm, adapter_name="warm")
    return stock


@pytest.fixture
def ours(tiny):
    pipe = copy.deepcopy(tiny.shared())
    draw(pipe)  # the batched forward is built
    return pipe


#: What is done to a pipeline whose objectives are adapters, and what the next call says.
UNDERMINED = {
    "unload": (lambda pipe: pipe.unload_lora_weights(), "objective 'warm'.*load_lora_weights"),
    "delete": (lambda pipe: pipe.delete_adapters("cool"), "objective 'cool'.*'cool' is not in"),
    "fuse": (lambda pipe: pipe.fuse_lora(), "fused.*unfuse_lora"),
    "fuse scaled": (lambda pipe: pipe.fuse_lora(lora_scale=2.0), "fused.*unfuse_lora"),
    "fuse one": (lambda pipe: pipe.unet.fuse_lora(adapter_names=["warm"]), "fused.*unfuse_lora"),
    "set": (lambda pipe: pipe.set_adapters("warm", 4.0), "set_adapters.*weights="),
    "disable": (lambda pipe: pipe.disable_lora(), r"disable_lora.*Objective\.base"),
    "disable below": (lambda pipe: pipe.unet.disable_lora(), "disabled"),
    "set below": (lambda pipe: pipe.unet.set_adapters(["warm", "cool"], [1, 4]), "activated"),
    "set one below": (lambda pipe: pipe.unet.set_adapters("warm"), "activated"),
}


@pytest.mark.filterwarnings("ignore:Adapter cool was active")
@pytest.mark.parametrize(("change", "named"), UNDERMINED.values(), ids=UNDERMINED)
def test_no_objective_becomes_another_model(ours, change, named):
    with pytest.raises(mf.AdapterMismatch, match=named):
        change(ours)
        draw(ours, weights=WARM)
    for forward in ("sequential", "batched"):
        ours.set_forward(forward)
        if named not in (UNDERMINED["set"][1], UNDERMINED["disable"][1]):  # they did nothing
            with pytest.raises(mf.AdapterMismatch, match=named):
                draw(ours)


def test_what_is_undone_is_as_before(ours):
    before = draw(ours)
    for module, do, undo in (
        (ours, "fuse_lora", "unfuse_lora"),
        (ours, "enable_lora", "enable_lora"),
        (ours.unet, "disable_lora", "enable_lora"),
    ):
        getattr(module, do)(**({"lora_scale": 2.0} if do == "fuse_lora" else {}))
        getattr(module, undo)()
        assert_close(draw(ours), before)


class TestLoadedLater:
    def test_an_adapter_is_no_objective_until_from_pipe(self, tiny, stock):
        parts = copy.deepcopy(tiny.stock().components)
        pipe = quiet(mf.MSDDAPipeline(**parts, requires_safety_checker=False))
        before = draw(pipe)
        pipe.load_lora_weights(tiny.warm, adapter_name="warm")
        with pytest.raises(mf.AdapterMismatch, match=r"'warm'.*no objective.*from_pipe"):
            draw(pipe)
        again = quiet(mf.MSDDAPipeline.from_pipe(pipe))
        assert list(again.objectives) == ["warm"] == again.get_active_adapters()
        assert_close(draw(again), draw(stock))
        pipe.delete_adapters("warm")
        assert_close(draw(pipe), before)
        assert pipe.get_active_adapters() == []
        assert list(mf.MSDDAPipeline.from_pipe(pipe).objectives) == ["base"]

    def test_fused_it_is_the_base_model(self, tiny, stock):
        parts = copy.deepcopy(tiny.stock().components)
        pipe = quiet(mf.MSDDAPipeline(**parts, requires_safety_checker=False))
        draw(pipe)
        for each in (pipe, stock):
            if each is pipe:
                each.load_lora_weights(tiny.warm, adapter_name="warm")
            each.fuse_lora(lora_scale=3.0)
        expected = draw(stock)
        for forward in ("sequential", "auto"):
            pipe.set_forward(forward)
            assert_close(draw(pipe), expected)
        pipe.unload_lora_weights()
        assert_close(draw(pipe), expected)

    def test_beside_objectives(self, tiny, ours):
        assert ours.get_active_adapters() == ["warm", "cool"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            ours.load_lora_weights(tiny.cool, adapter_name="third")
        with pytest.raises(mf.AdapterMismatch, match=r"'third'.*no objective"):
            draw(ours, weights=WARM)
        ours.delete_adapters("warm")
        again = quiet(mf.MSDDAPipeline.from_pipe(ours))  # not with "warm"
        assert {n: o.eta for n, o in again.objectives.items()} == {"cool": 0.8, "third": 1.0}
        cool = tiny.only(mf.Objective("cool"))
        assert_close(draw(again, weights={"cool": 0, "third": 1}), draw(cool))

    def test_below_the_pipeline(self, tiny, ours):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            weights = tiny.cool / "pytorch_lora_weights.safetensors"
            ours.unet.load_lora_adapter(weights, adapter_name="third", prefix="unet")
        with pytest.raises(mf.AdapterMismatch, match=r"'third'.*no objective"):
            draw(ours)

    def test_by_the_pipeline_whose_networks_are_shared(self, tiny, stock):
        """It stays usable, and so does the one made from it."""
        pipe = quiet(mf.MSDDAPipeline.from_pipe(stock))
        before = draw(pipe)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            stock.load_lora_weights(tiny.cool, adapter_name="cool")
        stock.set_adapters("cool", 0.5)
        assert_close(draw(pipe), before)
        assert list(mf.MSDDAPipeline.from_pipe(pipe).objectives) == ["warm"]
        with pytest.raises(mf.AdapterMismatch, match="set_adapters"):
            pipe.set_adapters("cool")


TARGETS = ["to_q", "to_v"]
KINDS = {
    "LoKr": LoKrConfig(r=2, alpha=32, target_modules=TARGETS, init_weights=False),
    "LoHa": LoHaConfig(r=2, alpha=32, target_modules=TARGETS, init_weights=False),
    "OFT": OFTConfig(oft_block_size=4, target_modules=TARGETS, init_weights=False),
    "BOFT": BOFTConfig(boft_block_size=4, target_modules=TARGETS, init_weights=False),
    "HRA": HRAConfig(r=4, target_modules=TARGETS, init_weights=False),
    "IA3": IA3Config(target_modules=TARGETS, feedforward_modules=[], init_ia3_weights=False),
    "DoRA": LoraConfig(r=2, use_dora=True, target_modules=TARGETS, init_lora_weights=False),
    "bias": LoraConfig(r=2, lora_bias=True, target_modules=["proj_in"], init_lora_weights=False),
}
SCALED = {"LoKr", "LoHa", "DoRA", "bias"}


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:.*BOFT", "ignore:.*CUDA"
)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_other_kinds_run_one_after_another(tiny, kind):
    stock = quiet(StableDiffusionPipeline(**copy.deepcopy(tiny.stock().components)))
    plain = draw(stock)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock.unet.add_adapter(KINDS[kind], "x")
    stock.unet.eval()
    expected = draw(stock)
    assert differ(expected, plain)
    objectives = {"x": mf.Objective(), "plain": mf.Objective.base()}
    pipe = quiet(mf.MSDDAPipeline.from_pipe(stock, objectives=objectives))
    for weights, latents in (((0, 1), plain), ((1, 0), expected)):
        assert_close(draw(pipe, weights=weights), latents)
    assert_close(draw(stock), expected)  # left as it was
    half = {"half": mf.Objective("x", scale=0.5)}
    if kind in SCALED:
        pipe = quiet(mf.MSDDAPipeline.from_pipe(stock, objectives=half))
        found = draw(pipe)
        stock.set_adapters("x", 0.5)
        assert_close(found, draw(stock))
    else:
        with pytest.raises(mf.AdapterMismatch, match=r"'x' has no scale.*scale=1"):
            mf.MSDDAPipeline.from_pipe(stock, objectives=half)
    if kind not in ("DoRA", "bias"):
        pipe = mf.MSDDAPipeline.from_pipe(stock)
        with pytest.raises(mf.AdapterMismatch, match="only LoRA can be saved"):
            pipe.save_pretrained("nowhere")


def test_a_hook_of_an_adapter_runs(stock):
    pipe = quiet(mf.MSDDAPipeline.from_pipe(stock))
    before = draw(pipe)
    for path, module in stock.unet.named_modules():
        if path.endswith("lora_B.warm"):
            module.register_forward_hook(lambda module, args, out: 0.5 * out)
    assert_close(draw(pipe), draw(stock))
    assert differ(draw(pipe), before)


def test_trained_copies_of_layers_are_refused(stock):
    stock.unet.delete_adapters("warm")
    config = LoraConfig(target_modules=TARGETS, modules_to_save=["conv_out"])
    stock.unet.add_adapter(config, "x")
    with pytest.raises(mf.AdapterMismatch, match=r"conv_out.*modules_to_save"):
        mf.MSDDAPipeline.from_pipe(stock, objectives={"x": mf.Objective()})


class TestANetworkOfItsOwn:
    """Runs as it is: its adapters are its own affair."""

    @pytest.mark.parametrize("state", ["fused", "active", "disabled", "fused and unloaded"])
    def test_with_an_adapter(self, tiny, stock, tmp_path, state):
        if state == "active":
            stock.set_adapters("warm", 2.0)
        if state == "disabled":
            stock.disable_lora()
        if "fused" in state:
            stock.fuse_lora(lora_scale=2.0)
        if "unloaded" in state:
            stock.unload_lora_weights()
        expected = draw(stock)
        assert differ(expected, draw(tiny.stock())) == (state != "disabled")
        objectives = {"own": mf.Objective(unet=stock.unet), "cool": mf.Objective(tiny.cool)}
        pipe = tiny.load(objectives=objectives)
        weights = {"own": 1, "cool": 0}
        for forward in ("sequential", "auto"):
            pipe.set_forward(forward)
            draw(pipe)  # with the other one, which switches
            assert_close(draw(pipe, weights=weights), expected)
        assert_close(draw(stock), expected)
        if state == "active":
            with pytest.raises(mf.AdapterMismatch, match=r"'own'.*'warm'.*fuse_lora"):
                pipe.save_pretrained(tmp_path / "saved")
        else:
            pipe.save_pretrained(tmp_path / "saved")
            saved = quiet(mf.MSDDAPipeline.from_pretrained(tmp_path / "saved"))
            assert_close(draw(saved, weights=weights), expected)

    def test_changed_later(self, tiny, stock):
        pipe = tiny.load(objectives={"own": mf.Objective(unet=stock.unet)})
        for change in (stock.disable_lora, stock.enable_lora, stock.fuse_lora, stock.unfuse_lora):
            change()
            assert_close(draw(pipe), draw(stock))

    def test_has_no_average_with_others_while_an_adapter_is_active(self, stock):
        networks = {"a": stock.unet, "b": small_unet()}
        with pytest.raises(mf.AdapterMismatch, match=r"'a'.*'warm'.*fuse_lora"):
            average_networks(networks, [0.5, 0.5])

    def test_that_is_the_pipelines_own_is_refused(self, stock):
        with pytest.raises(mf.AdapterMismatch, match=r"'x'.*warm.*Objective\.base"):
            mf.MSDDAPipeline.from_pipe(stock, objectives={"x": mf.Objective(unet=stock.unet)})


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_fused_pipeline_has_its_weights_as_the_base(stock):
    stock.fuse_lora(lora_scale=2.0)
    pipe = quiet(mf.MSDDAPipeline.from_pipe(stock, objectives={"base": mf.Objective.base()}))
    for forward in ("auto", "sequential"):
        pipe.set_forward(forward)
        assert_close(draw(pipe), draw(stock))


def test_an_adapter_of_the_text_encoder_may_not_go_either(tiny, tmp_path):
    text_encoder = copy.deepcopy(tiny.stock().text_encoder)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        both = write_adapter(tmp_path, small_unet(), text_encoder=text_encoder)
    objectives = {"both": mf.Objective(both)}
    pipe = tiny.load(objectives=objectives)
    draw(pipe)
    pipe.text_encoder = copy.deepcopy(tiny.stock().text_encoder)
    with pytest.raises(mf.AdapterMismatch, match=r"'both'.*text_encoder"):
        draw(pipe)
    pipe = tiny.load(objectives=objectives)
    pipe.fuse_lora(components=["text_encoder"])
    with pytest.raises(mf.AdapterMismatch, match=r"fused.*unfuse_lora"):
        draw(pipe)

# SPDX-License-Identifier: Apache-2.0
"""RS: weights averaged, which is DB-MPA only for networks that are linear in them."""

import copy
import gc
import weakref

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

import msdda_fast as mf
from msdda_fast.methods import pipeline_model
from msdda_fast.methods.db_mpa import DBMPA
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.model import BASE
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.methods.rewarded_soup import RewardedSoup
from tests.gaussian_world import Gaussian, mixed_eps_chain, moments, sd15_scheduler
from tests.methods.gaussian_model import exact_moments
from tests.tiny_model import WIDTH, quiet, small_unet, write_adapter

EXPERTS = {"warm": Gaussian(1, 0.25), "cool": Gaussian(-1, 0.5)}
ETAS = {"warm": 0.8, "cool": 1.0}
PROMPTS, SEEDS = ["a red dog", "a blue cat"], [0, 1]
STEPS = 2
RUN = dict(num_inference_steps=STEPS, guidance_scale=3.0)


def preference(w: float) -> dict[str, float]:
    return {"warm": w, "cool": 1 - w}


class TestLinear:
    @pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
    @pytest.mark.parametrize("eta", [None, 1.0])
    def test_closed_form(self, w, eta):
        """DB-MPA, at eta_w unless told."""
        found = exact_moments(RewardedSoup(eta=eta), EXPERTS, preference=preference(w), etas=ETAS)
        eta_w = (w / 0.8**2 + 1 - w) ** -0.5
        chain = mixed_eps_chain(list(EXPERTS.values()), [w, 1 - w], eta or eta_w, sd15_scheduler())
        assert found == pytest.approx(moments(chain), abs=1e-12)

    def test_at_effective_weights_it_is_msdda_in_the_limit(self):
        """And without them it is not, however small the steps."""
        options = dict(preference=preference(0.5), etas=ETAS, num_steps=500)
        ours = exact_moments(MSDDA(), EXPERTS, **options)
        remapped, plain = (
            exact_moments(RewardedSoup(remapped=flag), EXPERTS, **options) for flag in (True, False)
        )
        assert abs(remapped.mean - ours.mean) < 0.1 * abs(plain.mean - ours.mean)

    def test_averaging_by_precision_is_seen(self):
        """Weights are averaged by w, not by the shares of Eq. 7."""
        share = 0.5 / 0.64 / (0.5 / 0.64 + 0.5)
        found = exact_moments(RewardedSoup(eta=1.0), EXPERTS, preference=preference(0.5), etas=ETAS)
        wrong = mixed_eps_chain(list(EXPERTS.values()), [share, 1 - share], 1.0, sd15_scheduler())
        assert abs(found.mean - moments(wrong).mean) > 0.05


def folded(unet, merged):
    """A copy of a bare network with updates by module path added to its weights."""
    unet = copy.deepcopy(unet)
    modules = dict(unet.named_modules())
    for path, update in merged.items():
        modules[path].weight.data += update
    return unet


def factors_of(folder):
    """(B, A) by module path of a file of the UNet's factors."""
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    paths = {key.removeprefix("unet.").rsplit(".lora_", 1)[0] for key in state if "unet." in key}
    return {
        path: tuple(state[f"unet.{path}.lora_{part}.weight"] for part in "BA") for path in paths
    }


def drawn_by(tiny, unet, eta):
    """Images of a network without adapters."""
    stock = tiny.stock()
    pipe = mf.MSDDAPipeline.from_pipe(stock, objectives={"one": mf.Objective(unet=unet, eta=eta)})
    return quiet(pipe)(PROMPTS, seed=SEEDS, output_type="pt", **RUN).images


def test_the_soup_is_the_network_of_averaged_updates(tiny, pipe):
    warm, cool = factors_of(tiny.warm), factors_of(tiny.cool)
    unet = folded(
        tiny.stock().unet,
        {
            path: 0.3 * (6 / 2) * warm[path][0] @ warm[path][1]  # alpha / rank of `tiny`
            + 0.7 * (3 / 3) * cool[path][0] @ cool[path][1]
            for path in warm
        },
    )
    drawn = RewardedSoup(eta=0.9)(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)
    torch.testing.assert_close(drawn.images, drawn_by(tiny, unet, 0.9), rtol=0, atol=1e-4)
    # and not the average of the predictions of a network that is not linear
    mixed = DBMPA(eta=0.9)(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)
    assert (drawn.images - mixed.images).abs().max() > 1e-2


def test_the_factor_merge_is_the_average_of_the_files(tiny, tmp_path):
    other = write_adapter(tmp_path / "other", small_unet(), rank=2, lora_alpha=2)
    objectives = {"warm": mf.Objective(tiny.warm), "cool": mf.Objective(other)}
    pipe = tiny.load(objectives=objectives)
    warm, cool = factors_of(tiny.warm), factors_of(other)
    merged = {
        path: (0.3 * 3 * warm[path][0] + 0.7 * cool[path][0])
        @ (0.3 * warm[path][1] + 0.7 * cool[path][1])
        for path in warm
    }
    unet = folded(tiny.stock().unet, merged)
    drawn = RewardedSoup(merge="factor")(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)
    torch.testing.assert_close(drawn.images, drawn_by(tiny, unet, 1.0), rtol=0, atol=1e-4)
    product = RewardedSoup()(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)
    assert (drawn.images - product.images).abs().max() > 1e-2


def test_the_factor_merge_needs_one_rank(pipe):
    with pytest.raises(mf.AdapterMismatch, match=r"'warm': 2, 'cool': 3.*merge='product'"):
        RewardedSoup(merge="factor")(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)


@pytest.mark.parametrize("merge", ["product", "factor"])
@pytest.mark.parametrize("w", [0.0, 1.0])
def test_one_hot_is_the_single_model_bit_for_bit(pipe, merge, w):
    drawn = RewardedSoup(merge=merge)(pipe, PROMPTS, preference(w), SEEDS, **RUN)
    name = "warm" if w else "cool"
    with torch.no_grad(), model_of(pipe, {name: 1.0}) as model:
        expected = model.decode(model.generate({name: 1.0}, model.etas))
    assert torch.equal(drawn.images, expected)
    in_pair = MSDDA()(pipe, PROMPTS, preference(w), SEEDS, **RUN)
    torch.testing.assert_close(drawn.images, in_pair.images, rtol=0, atol=1e-5)


def model_of(pipe, weights=None) -> PipelineModel:
    return PipelineModel(
        pipe, PROMPTS, weights or preference(0.3), SEEDS, num_steps=STEPS, guidance_scale=3.0
    )


def test_a_soup_step_by_step_is_the_soup_in_one_call(pipe):
    """Switching between soup and objectives, too."""
    with torch.no_grad(), model_of(pipe) as model:
        soup = model.soup({"warm": 0.3, "cool": 0.7})
        x = model.initial()
        for k in range(STEPS):
            model.eps(x, k, "warm")
            x = DDIMStep.of(model.grid, k, 0.8).prev(x, model.eps(x, k, soup), model.noise(k))
            model.eps(x, 0)
        expected = model.generate({soup: 1.0}, {soup: 0.8})
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


@pytest.mark.full  # several soups; one is compared above
def test_every_soup_is_its_own(pipe):
    """Under one name after another model's, and beside another one."""
    images = [
        RewardedSoup(eta=1.0)(pipe, PROMPTS, preference(w), SEEDS, **RUN).images for w in (0.2, 0.8)
    ]
    assert (images[0] - images[1]).abs().max() > 1e-2
    with torch.no_grad(), model_of(pipe) as model:
        soups = [model.soup(preference(w)) for w in (0.2, 0.8)]
        assert len(set(soups)) == 2
        for soup, expected in zip(soups, images, strict=True):
            drawn = model.decode(model.generate({soup: 1.0}, {soup: 1.0}))
            assert torch.equal(drawn, expected)


def everything(*networks):
    """All that a soup might leave behind."""
    state = []
    for network in networks:
        layers = {n: m for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)}
        state += [
            {n: (id(p), p._version, p.requires_grad) for n, p in network.named_parameters()},
            {n: m.training for n, m in network.named_modules()},
            {
                n: (list(m.active_adapters), m.disable_adapters, dict(m.scaling), list(m.r))
                for n, m in layers.items()
            },
            list(getattr(network, "peft_config", {})),
            getattr(network, "_hf_peft_config_loaded", False),
        ]
    return state


@pytest.mark.sweep(fails=1)
@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_stays_as_it_was(tiny, fails):
    pipe = tiny.load()
    next(pipe.unet.parameters()).requires_grad = True
    before, random = everything(pipe.unet, pipe.text_encoder), torch.get_rng_state()
    with torch.no_grad(), model_of(pipe) as model:
        model.soup(preference(0.3))
        if fails:
            with pytest.raises(mf.AdapterMismatch):
                model.soup(preference(0.3), "factor")
        soup = model.soup(preference(0.8))
        model.generate({soup: 1.0}, {soup: 1.0})
        assert everything(pipe.unet, pipe.text_encoder) != before
    assert everything(pipe.unet, pipe.text_encoder) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert list(pipe.objectives) == list(pipe.variants) == ["warm", "cool"]


@pytest.mark.full  # memory of a long comparison
def test_nothing_keeps_a_soup_alive(tiny):
    pipe = tiny.load()
    with torch.no_grad(), model_of(pipe) as model:
        soup = model.soup(preference(0.3))
        model.generate({soup: 1.0}, {soup: 1.0})
        model.generate(preference(0.3), model.etas)
        factors = [
            weakref.ref(module.lora_A[soup])
            for module in pipe.unet.modules()
            if soup in getattr(module, "lora_A", {})
        ]
        runner = weakref.ref(next(iter(model._views_of_made.values()))._runner)
        assert factors and runner() is not None
    del model
    gc.collect()
    assert all(factor() is None for factor in factors)
    assert runner() is None
    assert list(pipeline_model._views[pipe]) == [("warm", "cool")]


def test_networks_of_their_own_are_averaged(tiny):
    torch.manual_seed(0)
    networks = {"warm": small_unet(width=WIDTH), "cool": small_unet(width=WIDTH)}
    objectives = {name: mf.Objective(unet=unet) for name, unet in networks.items()}
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.stock(), objectives=objectives))
    before = everything(*networks.values())
    average = small_unet(width=WIDTH)
    average.load_state_dict(
        {
            key: 0.3 * value + 0.7 * networks["cool"].state_dict()[key]
            for key, value in networks["warm"].state_dict().items()
        }
    )
    drawn = RewardedSoup()(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)
    expected = drawn_by(tiny, average, 1.0)
    torch.testing.assert_close(drawn.images, expected, rtol=0, atol=1e-5)
    assert everything(*networks.values()) == before


def test_what_cannot_be_averaged_is_named(tiny):
    networks = {"other": small_unet(), "wide": small_unet(channels=32)}
    objectives = {
        "warm": mf.Objective("warm"),
        **{name: mf.Objective(unet=unet) for name, unet in networks.items()},
    }
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=objectives))
    for other, reason in (("warm", "some are adapters"), ("wide", "'conv_in.weight' is")):
        with pytest.raises(mf.AdapterMismatch, match=reason):
            RewardedSoup()(pipe, PROMPTS, {"other": 0.5, other: 0.5}, SEEDS, **RUN)


def test_the_base_takes_part(tiny, pipe):
    """Half of the base and half of an adapter is the adapter at half its scale."""
    with torch.no_grad(), model_of(pipe) as model:
        soup = model.soup({BASE: 0.5, "cool": 0.5})
        x_0 = model.generate({soup: 1.0}, {soup: 1.0})
    half = tiny.only(mf.Objective("cool", scale=0.5))
    expected = half(PROMPTS, seed=SEEDS, output_type="latent", **RUN).images
    torch.testing.assert_close(x_0, expected, rtol=0, atol=1e-4)


@pytest.mark.full  # by the same code as those of the UNet
def test_adapters_of_the_text_encoder_are_averaged_too(tiny, tmp_path):
    """A soup of an adapter with itself is that adapter, in both networks."""
    text_encoder = copy.deepcopy(tiny.stock().text_encoder)
    both = write_adapter(tmp_path / "both", small_unet(), text_encoder=text_encoder)
    pipe = tiny.load(objectives={"warm": mf.Objective(both), "cool": mf.Objective(both)})
    before = everything(pipe.unet, pipe.text_encoder)
    drawn = RewardedSoup()(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)
    single = MSDDA()(pipe, PROMPTS, preference(1.0), SEEDS, **RUN)
    torch.testing.assert_close(drawn.images, single.images, rtol=0, atol=1e-4)
    without = write_adapter(tmp_path / "without", small_unet())
    assert everything(pipe.unet, pipe.text_encoder) == before
    other = tiny.load(objectives={"warm": mf.Objective(both), "cool": mf.Objective(without)})
    assert RewardedSoup()(other, PROMPTS, preference(0.3), SEEDS, **RUN).images.isfinite().all()


def test_guidance_is_averaged(tiny):
    own = {"warm": 2.0, "cool": 4.0}
    objectives = {name: mf.Objective(name, guidance_scale=g) for name, g in own.items()}
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared(), objectives=objectives))
    drawn = RewardedSoup(eta=1.0)(pipe, PROMPTS, preference(0.25), SEEDS, num_inference_steps=STEPS)
    run = dict(num_inference_steps=STEPS, guidance_scale=3.5)
    expected = RewardedSoup(eta=1.0)(tiny.shared(), PROMPTS, preference(0.25), SEEDS, **run)
    torch.testing.assert_close(drawn.images, expected.images, rtol=0, atol=1e-5)

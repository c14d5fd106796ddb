# SPDX-License-Identifier: Apache-2.0
"""An accelerator joins every objective and the base of Stable Diffusion, in few steps."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, TCDScheduler

import msdda_fast as mf
from msdda_fast.errors import AdapterMismatch, InvalidSchedule
from msdda_fast.pipelines.accelerator import Accelerator
from msdda_fast.pipelines.identity import model_identity
from msdda_fast.reference import fuse_posteriors
from tests.tiny_model import WEIGHTS, TinyModel, quiet, small_unet, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of peft

PROMPTS = ["a red dog", "a blue cat"]
STEPS, SHAPE, SEEDS = 4, (2, 4, 8, 8), [11, 12]
KINDS = {"lcm": LCMScheduler, "tcd": TCDScheduler}
WEIGHT = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64)
CALL = {"seed": SEEDS, "weights": WEIGHT, "output_type": "latent"}
# a step rounds some 8 values, and predicting x_0 amplifies that by 1 / sqrt(alpha_bar_999) = 15
CLOSE = 15 * 8 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """A folder with accelerators, by the scheduler that their names say; fixed factors."""
    folder = tmp_path_factory.mktemp("fast")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        for name in ("lcm", "tcd"):
            write_adapter(folder / name, small_unet(), rank=3)
    return folder


@pytest.fixture(scope="module")
def accelerated(tiny, fast):
    """Pipelines by kind, which calls leave as they are."""
    return {name: tiny.load(accelerator=fast / name) for name in KINDS}


@pytest.fixture(scope="module")
def stock(tiny, fast):
    """A stock pipeline that holds every adapter."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny.folder)
    for name, folder in {"warm": tiny.warm, "cool": tiny.cool, **dict.fromkeys(KINDS)}.items():
        place = folder or fast / name
        pipe.load_lora_weights(place, weight_name=WEIGHTS, adapter_name=name)
    return quiet(pipe)


def algorithm_1(stock, kind, adapters, gammas=(0.3, 0.3), acts=lambda m, t: True, weight=WEIGHT):
    """Eq. 7 over the stock UNet and scheduler: objective m with the accelerator and adapter m."""
    scheduler = KINDS[kind].from_config(stock.scheduler.config)
    scheduler.set_timesteps(STEPS)
    bars = scheduler.alphas_cumprod.double()
    embeds, _ = stock.encode_prompt(PROMPTS, "cpu", 1, False)
    x = mf.counter_noise(SEEDS, SHAPE, stream=0)
    steps = scheduler.timesteps.tolist()
    for k, t in enumerate(steps):
        after = steps[k + 1] if k + 1 < STEPS else 0
        means, variances = [], []
        for m, adapter in enumerate(adapters):
            stock.set_adapters([kind, adapter] if acts(m, t) and adapter else [kind])
            with torch.no_grad():
                out = stock.unet(x, t, encoder_hidden_states=embeds).sample
            scheduler._step_index = k
            if kind == "lcm":
                clean = scheduler.step(out, t, x).denoised.double()
                last = k + 1 == STEPS
                p = torch.ones(()).double() if last else bars[after]
                means.append(p.sqrt() * clean)
                variances.append(1 - p)
            else:
                made = scheduler.step(out, t, x, eta=gammas[m])
                down = bars[int((1 - gammas[m]) * after)]
                means.append((bars[after] / down).sqrt() * made.pred_noised_sample.double())
                variances.append(1 - bars[after] / down)
        if k + 1 == STEPS:  # no noise: shares in the limit, where variances are as gammas
            variances = [1.0, 1.0] if kind == "lcm" else gammas
        variances = torch.tensor(variances).double()
        mean, variance = fuse_posteriors(torch.stack(means), variances, weight.T)
        z = mf.counter_noise(SEEDS, SHAPE, step=k).double()
        noise = 0 if k + 1 == STEPS else variance.sqrt().reshape(-1, 1, 1, 1) * z
        x = (mean + noise).float()
    return x


def assert_close(got, expected, bound=CLOSE):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_two_objectives_are_algorithm_1(accelerated, stock, kind):
    pipe = accelerated[kind]
    got = pipe(PROMPTS, **CALL, num_inference_steps=STEPS).images
    assert_close(got, algorithm_1(stock, kind, ["warm", "cool"]))
    pipe.set_forward("sequential")
    one_by_one = pipe(PROMPTS, **CALL, num_inference_steps=STEPS).images
    pipe.set_forward()
    assert_close(one_by_one, got)
    assert_close(pipe(PROMPTS, **CALL).images, got, 0)  # T and guidance are the accelerator's


def test_gammas_of_the_call(accelerated, stock):
    gammas = {"warm": 0.6, "cool": 0.2}
    got = accelerated["tcd"](PROMPTS, **CALL, etas=gammas).images
    expected = algorithm_1(stock, "tcd", ["warm", "cool"], gammas=(0.6, 0.2))
    assert_close(got, expected)
    assert (expected - algorithm_1(stock, "tcd", ["warm", "cool"])).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_with_the_accelerator_stands_in_outside_of_a_range(tiny, stock, fast, kind):
    objectives = {
        "warm": mf.Objective(tiny.warm, timesteps=(500, 999)),
        "cool": mf.Objective(tiny.cool, eta=0.8),
    }
    pipe = tiny.load(objectives=objectives, accelerator=fast / kind)
    got = pipe(PROMPTS, **CALL).images
    acts = lambda m, t: m == 1 or t >= 500  # noqa: E731
    assert_close(got, algorithm_1(stock, kind, ["warm", "cool"], acts=acts))


def test_strength_0_is_the_base_with_the_accelerator(accelerated, stock):
    got = accelerated["lcm"](PROMPTS, **CALL, strength=0.0).images
    assert_close(got, algorithm_1(stock, "lcm", [None, None]))


def test_a_scale_is_that_of_the_preference(tiny, fast, stock):
    pipe = tiny.load(
        objectives={"warm": mf.Objective(tiny.warm, scale=0.5), "base": mf.Objective.base()},
        accelerator=fast / "lcm",
    )
    half = pipe(PROMPTS, **CALL | {"weights": [1.0, 0.0]}).images
    whole = pipe(PROMPTS, **CALL | {"weights": [1.0, 0.0]}, strength=0.0).images
    assert_close(whole, algorithm_1(stock, "lcm", [None, None]))
    stock.set_adapters(["lcm", "warm"])
    for layer in stock.unet.modules():
        if "warm" in getattr(layer, "scaling", {}):
            layer.scaling["warm"] *= 0.5
    try:
        only = torch.tensor([[1.0, 0.0]] * 2).double()
        keep = stock.set_adapters
        stock.set_adapters = lambda names: None  # which would scale anew
        expected = algorithm_1(stock, "lcm", ["warm", "warm"], weight=only)
    finally:
        stock.set_adapters = keep
        for layer in stock.unet.modules():
            if "warm" in getattr(layer, "scaling", {}):
                layer.scaling["warm"] *= 2
    assert_close(half, expected)


def test_one_objective_is_the_stock_pipeline(accelerated, stock):
    """Generators draw as in stock diffusers."""
    pipe, request = accelerated["lcm"], {"num_inference_steps": STEPS, "output_type": "latent"}
    ddim = stock.scheduler
    stock.scheduler = LCMScheduler.from_config(ddim.config)
    stock.set_adapters(["lcm", "warm"])
    expected = stock(PROMPTS, generator=torch.manual_seed(3), guidance_scale=1.0, **request).images
    stock.scheduler = ddim
    got = pipe(PROMPTS, weights=[1.0, 0.0], generator=torch.manual_seed(3), **request).images
    assert_close(got, expected)


def test_merged_adapters_include_it(tiny, fast):
    """One objective twice is merged without an error."""
    objectives = {"one": mf.Objective(tiny.warm), "two": mf.Objective(tiny.warm)}
    pipe = tiny.load(objectives=objectives, accelerator=fast / "lcm")
    assert_close(pipe(PROMPTS, **CALL, mode="merged").images, pipe(PROMPTS, **CALL).images)


class TestLoading:
    def test_what_the_pipeline_says_of_it(self, accelerated, tiny, fast):
        for name, kind in KINDS.items():
            pipe = accelerated[name]
            assert type(pipe.scheduler) is kind
            assert pipe.accelerator == Accelerator(fast / name, scheduler=kind.__name__)
            assert [one.guidance_scale for one in pipe.objectives.values()] == [1.0, 1.0]
        assert tiny.shared().accelerator is None

    def test_own(self, tiny, fast, tmp_path):
        with pytest.raises(AdapterMismatch, match="ships with none"):
            tiny.load(accelerator="own")
        model = TinyModel.at(tmp_path)
        shutil.copytree(tiny.folder, model.folder)
        shutil.copytree(fast / "lcm", model.folder / "quick")
        entry = {"source": "quick", "scheduler": "TCDScheduler", "steps": 6, "guidance_scale": 2.0}
        manifest = model.folder / "manifest.json"
        manifest.write_text(json.dumps({"id": "x", "accelerator": entry}))
        pipe = model.load(accelerator="own")
        assert type(pipe.scheduler) is TCDScheduler and pipe.accelerator.steps == 6
        assert pipe.accelerator.source == str(model.folder / "quick")
        assert [one.guidance_scale for one in pipe.objectives.values()] == [2.0, 2.0]
        for field, value in {
            "source": "../elsewhere",
            "scheduler": "EulerDiscreteScheduler",
            "steps": 0,
            "guidance_scale": "none",
            "speed": 2,
        }.items():
            manifest.write_text(json.dumps({"accelerator": {**entry, field: value}}))
            with pytest.raises(ValueError, match=r"manifest\.json of"):
                model.load(accelerator="own")

    def test_a_given_scheduler_stays(self, tiny, fast):
        ddim = DDIMScheduler.from_config(tiny.shared().scheduler.config)
        pipe = tiny.load(accelerator=fast / "lcm", scheduler=ddim)
        assert type(pipe.scheduler) is DDIMScheduler

    def test_one_for_another_base_is_named(self, tiny, tmp_path):
        write_adapter(tmp_path / "lcm", small_unet(channels=32))
        with pytest.raises(AdapterMismatch, match=r"'accelerator' .*lcm.*down_blocks"):
            tiny.load(accelerator=tmp_path / "lcm")
        for wrong in ("", 3):
            with pytest.raises(ValueError, match="accelerator must be"):
                tiny.load(accelerator=wrong)
        with pytest.raises(FileNotFoundError):
            tiny.load(accelerator=tmp_path / "nothing")

    def test_networks_of_their_own_are_refused(self, tiny, fast):
        objectives = {"own": mf.Objective(unet=small_unet())}
        with pytest.raises(ValueError, match="'own' is a network of its own"):
            tiny.load(objectives=objectives, accelerator=fast / "lcm")

    def test_lcm_has_no_level(self, accelerated):
        with pytest.raises(InvalidSchedule, match="fixed by LCM"):
            accelerated["lcm"](PROMPTS, **CALL, etas={"warm": 0.5})

    def test_from_pipe_takes_it_along(self, accelerated, fast, tiny):
        pipe = accelerated["lcm"]
        again = quiet(mf.MSDDAPipeline.from_pipe(pipe))
        assert again.accelerator == pipe.accelerator
        expected = pipe(PROMPTS, **CALL, strength=0.5).images
        assert_close(again(PROMPTS, **CALL, strength=0.5).images, expected, 0)
        base = quiet(mf.MSDDAPipeline.from_pipe(pipe, objectives={"base": mf.Objective.base()}))
        got = base(PROMPTS, **CALL | {"weights": [1.0]}).images
        assert_close(got, pipe(PROMPTS, **CALL, strength=0.0).images)

    def test_adapters_loaded_since_lack_it(self, tiny, fast):
        pipe = tiny.load(accelerator=fast / "lcm")
        pipe.load_lora_weights(tiny.warm, weight_name=WEIGHTS, adapter_name="late")
        with pytest.raises(AdapterMismatch, match=r"'late'.*accelerator="):
            mf.MSDDAPipeline.from_pipe(pipe)


def test_save_and_load(accelerated, fast, tmp_path):
    pipe = accelerated["tcd"]
    objectives = {
        "warm": mf.Objective("warm", timesteps=(500, 999)),
        "cool": mf.Objective("cool"),
        "base": mf.Objective.base(),
    }
    pipe = quiet(mf.MSDDAPipeline.from_pipe(pipe, objectives=objectives))
    call = CALL | {"weights": [0.2, 0.5, 0.3], "strength": {"warm": 0.5}}
    expected = pipe(PROMPTS, **call).images
    pipe.save_pretrained(tmp_path / "out")
    for accelerator in (None, "own"):
        loaded = mf.MSDDAPipeline.from_pretrained(tmp_path / "out", accelerator=accelerator)
        assert type(loaded.scheduler) is TCDScheduler
        assert loaded.accelerator.steps == STEPS
        assert_close(quiet(loaded)(PROMPTS, **call).images, expected)
    with pytest.raises(ValueError, match="include one"):
        mf.MSDDAPipeline.from_pretrained(tmp_path / "out", accelerator=fast / "lcm")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(stock.scheduler) is TCDScheduler


def test_kept_results_tell_what_drew_them(accelerated, tiny):
    plain = model_identity(tiny.shared())
    assert "sampler" not in plain and "accelerator" not in plain
    lcm, tcd = (model_identity(accelerated[name]) for name in KINDS)
    assert (lcm["sampler"], tcd["sampler"]) == ("LCMScheduler", "TCDScheduler")
    assert lcm["accelerator"] != tcd["accelerator"]
    assert lcm["objectives"]["warm"]["adapter"] != plain["objectives"]["warm"]["adapter"]


@pytest.mark.parametrize("strength", [None, 0.0])
def test_the_engine_draws_with_it(accelerated, strength):
    pipe = accelerated["lcm"]
    weights = {"warm": 0.3, "cool": 0.7}
    request = mf.ImageRequest(
        "a red dog", weights=weights, seed=4, num_inference_steps=STEPS, strength=strength
    )
    with mf.Engine(pipe, output_type="latent") as engine:
        got = engine.submit(request).result().image
    call = {"weights": weights, "strength": strength, "seed": 4, "output_type": "latent"}
    expected = pipe("a red dog", **call).images
    assert_close(got.reshape(expected.shape), expected)

# SPDX-License-Identifier: Apache-2.0
"""The MORL oracle: the adapter of this very preference, or a refusal."""

import shutil

import pytest
import torch

import msdda_fast as mf
from msdda_fast.methods.morl_oracle import MORLOracle
from tests.gaussian_world import Gaussian, ddim_chain, moments, sd15_scheduler
from tests.methods.gaussian_model import exact_moments
from tests.methods.test_rewarded_soup import everything
from tests.tiny_model import quiet, small_unet, write_adapter

TRAINED = {"at .2": Gaussian(1, 0.25), "at .5": Gaussian(-1, 0.5)}
PROMPTS, SEEDS = ["a red dog", "a blue cat"], [0, 1]
RUN = dict(num_inference_steps=2, guidance_scale=3.0)


def preference(w: float) -> dict[str, float]:
    return {"warm": 1 - w, "cool": w}


def oracle(**settings) -> MORLOracle:
    return MORLOracle(objective="cool", adapters={0.2: "at .2", 0.5: "at .5"}, **settings)


@pytest.mark.parametrize(("w", "path"), [(0.2, "at .2"), (0.2 + 1e-9, "at .2"), (0.5, "at .5")])
@pytest.mark.parametrize("eta", [1.0, 0.8])
def test_closed_form(w, path, eta):
    """At its own eta, whatever those of the objectives are."""
    etas = {"warm": 0.3, "cool": 0.4}
    found = exact_moments(
        oracle(eta=eta), TRAINED, preference=preference(w), etas=etas, files=TRAINED
    )
    expected = moments(ddim_chain(TRAINED[path], eta, sd15_scheduler()))
    assert found == pytest.approx(expected, abs=1e-12)


def test_its_noise_is_that_of_the_fused_step():
    """eta_w = (.8 / .3^2 + .2 / .4^2)^(-1/2), unless another eta is asked for."""
    eta_w = (0.8 / 0.3**2 + 0.2 / 0.4**2) ** -0.5
    etas = {"warm": 0.3, "cool": 0.4}
    found = exact_moments(oracle(), TRAINED, preference=preference(0.2), etas=etas, files=TRAINED)
    expected = moments(ddim_chain(TRAINED["at .2"], eta_w, sd15_scheduler()))
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_nearest_adapter_is_not_good_enough():
    message = r"weight 0\.3 of 'cool'; known: 0\.2, 0\.5"
    with pytest.raises(mf.InvalidWeights, match=message):
        exact_moments(oracle(), TRAINED, preference=preference(0.3), files=TRAINED)


@pytest.mark.parametrize(
    "other", [{"warm": 0.5, "cold": 0.5}, {"warm": 0.5, "cool": 0.2, "cold": 0.3}]
)
def test_weights_of_other_objectives_say_nothing(other):
    with pytest.raises(mf.InvalidWeights, match="'cool' and one other objective"):
        exact_moments(oracle(), TRAINED, preference=other, files=TRAINED)


def test_it_is_the_adapter_on_the_base_bit_for_bit(tiny, pipe):
    before = everything(pipe.unet, pipe.text_encoder)
    method = MORLOracle(objective="cool", adapters={0.3: tiny.cool}, eta=0.8)
    drawn = method(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)
    single = tiny.only(mf.Objective("cool", eta=0.8))
    expected = single(PROMPTS, seed=SEEDS, output_type="pt", **RUN).images
    assert torch.equal(drawn.images, expected)
    assert everything(pipe.unet, pipe.text_encoder) == before


def test_a_base_without_adapters_is_left_without(tiny):
    """Layers that were wrapped for the adapter are bare again."""
    objectives = {"warm": mf.Objective.base(), "cool": mf.Objective.base()}
    pipe = tiny.load(objectives=objectives)
    before = everything(pipe.unet, pipe.text_encoder)
    method = MORLOracle(objective="cool", adapters={0.3: tiny.cool})
    drawn = method(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)
    assert everything(pipe.unet, pipe.text_encoder) == before
    expected = tiny.only(mf.Objective("cool", eta=1.0))
    torch.testing.assert_close(
        drawn.images, expected(PROMPTS, seed=SEEDS, output_type="pt", **RUN).images
    )


def test_bad_adapters_change_nothing(tiny, pipe, tmp_path):
    before = everything(pipe.unet, pipe.text_encoder)
    wide = write_adapter(tmp_path / "wide", small_unet(channels=32))
    (tmp_path / "empty").mkdir()
    shutil.copy(tiny.folder / "model_index.json", tmp_path / "empty")
    for path, error in (
        (wide, mf.AdapterMismatch),
        (tmp_path / "empty", FileNotFoundError),
        (tmp_path / "nowhere", FileNotFoundError),
    ):
        method = MORLOracle(objective="cool", adapters={0.3: path})
        with pytest.raises(error):
            method(pipe, PROMPTS, preference(0.3), SEEDS, **RUN)
    assert everything(pipe.unet, pipe.text_encoder) == before


def test_another_adapter_may_lie_there_next_time(tiny, tmp_path):
    pipe = quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))
    method = MORLOracle(objective="cool", adapters={0.3: tmp_path / "it"}, eta=0.8)
    images = []
    for source in (tiny.warm, tiny.cool):
        shutil.copytree(source, tmp_path / "it", dirs_exist_ok=True)
        images.append(method(pipe, PROMPTS, preference(0.3), SEEDS, **RUN).images)
    assert (images[0] - images[1]).abs().max() > 1e-2

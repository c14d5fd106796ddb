# SPDX-License-Identifier: Apache-2.0
"""DB-MPA: mixed predictions, one DDIM step; and how MSDDA over unequal etas compares with it."""

import pytest
import torch

from msdda_fast.methods.db_mpa import DBMPA
from msdda_fast.methods.msdda import MSDDA
from tests.gaussian_world import Gaussian, ddim_chain, mixed_eps_chain, moments, sd15_scheduler
from tests.methods.gaussian_model import exact_moments

EXPERTS = {"warm": Gaussian(1, 0.25), "cool": Gaussian(-1, 0.5)}
ETAS = {"warm": 0.8, "cool": 1.0}
EQUAL = dict.fromkeys(EXPERTS, 1.0)
PROMPTS, SEEDS = ["a dog", "a cat"], [0, 1]


def preference(w: float) -> dict[str, float]:
    return {"warm": w, "cool": 1 - w}


def mixed(weights, eta, num_steps=50):
    chain = mixed_eps_chain(list(EXPERTS.values()), weights, eta, sd15_scheduler(), num_steps)
    return moments(chain)


@pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("eta", [1.0, 0.6, 0.0])
def test_closed_form(w, eta):
    """The objectives' own etas play no part."""
    found = exact_moments(DBMPA(eta=eta), EXPERTS, preference=preference(w), etas=ETAS)
    assert found == pytest.approx(mixed([w, 1 - w], eta), abs=1e-12)


def test_taking_the_objectives_own_etas_is_seen():
    """The likeliest wrong port: MSDDA, with its precision weights."""
    found = exact_moments(DBMPA(), EXPERTS, preference=preference(0.5), etas=ETAS)
    fused = exact_moments(MSDDA(), EXPERTS, preference=preference(0.5), etas=ETAS)
    assert abs(found.mean - fused.mean) > 0.05


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_equal_etas_make_it_msdda(w):
    expected = exact_moments(MSDDA(), EXPERTS, preference=preference(w), etas=EQUAL)
    found = exact_moments(DBMPA(), EXPERTS, preference=preference(w), etas=EQUAL)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["warm", "cool"])
def test_one_hot_is_the_single_model(name):
    one_hot = {n: float(n == name) for n in EXPERTS}
    expected = moments(ddim_chain(EXPERTS[name], 1.0, sd15_scheduler()))
    assert exact_moments(DBMPA(), EXPERTS, preference=one_hot) == pytest.approx(expected, abs=1e-12)


class TestRemapped:
    @pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
    def test_closed_form(self, w):
        precision = w / 0.8**2 + (1 - w)
        what = w * (1 + 0.8**-2) / (1 + precision)
        found = exact_moments(DBMPA(remapped=True), EXPERTS, preference=preference(w), etas=ETAS)
        expected = mixed([what, 1 - what], precision**-0.5)
        assert found == pytest.approx(expected, abs=1e-12)

    @pytest.mark.full  # the closed form is above
    @pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
    def test_many_steps_make_it_msdda(self, w):
        """At rate 1/T; without the remapping the gap stays."""

        def gaps(method):
            return [
                abs(
                    exact_moments(method, **world, num_steps=T).mean
                    - exact_moments(MSDDA(), **world, num_steps=T).mean
                )
                for T in (50, 500)
            ]

        world = dict(models=EXPERTS, preference=preference(w), etas=ETAS)
        few, many = gaps(DBMPA(remapped=True))
        assert few < 0.01 and 8 < few / many < 16
        few, many = gaps(DBMPA(eta=(w / 0.64 + 1 - w) ** -0.5))
        assert many > 0.03 and few / many < 1.2

    def test_equal_etas_remap_nothing(self):
        world = dict(models=EXPERTS, preference=preference(0.3), etas=dict.fromkeys(EXPERTS, 0.7))
        expected = exact_moments(DBMPA(eta=0.7), **world)
        assert exact_moments(DBMPA(remapped=True), **world) == pytest.approx(expected, abs=1e-12)

    def test_it_has_an_eta_of_its_own(self):
        with pytest.raises(ValueError, match=r"steps at eta_w, got eta=0\.5"):
            DBMPA(eta=0.5, remapped=True)


def test_on_a_pipeline(pipe):
    """Equal etas and one-hot preferences, on networks that are not linear."""
    run = dict(num_inference_steps=4, guidance_scale=3.0)
    w = preference(0.3)
    fused = MSDDA(etas=EQUAL)(pipe, PROMPTS, w, SEEDS, **run)
    drawn = DBMPA()(pipe, PROMPTS, w, SEEDS, **run)
    torch.testing.assert_close(drawn.images, fused.images, rtol=0, atol=1e-5)
    own = MSDDA()(pipe, PROMPTS, w, SEEDS, **run)
    assert (drawn.images - own.images).abs().max() > 1e-2

    single = MSDDA(etas=EQUAL)(pipe, PROMPTS, preference(1.0), SEEDS, **run)
    one_hot = DBMPA()(pipe, PROMPTS, preference(1.0), SEEDS, **run)
    assert torch.equal(one_hot.images, single.images)

# SPDX-License-Identifier: Apache-2.0
"""DB-KLA and DeRaDiff: between the base and the aligned model, and beyond."""

import pytest
import torch

import msdda_fast as mf
from msdda_fast.methods.db_kla import DBKLA
from msdda_fast.methods.deradiff import DeRaDiff
from msdda_fast.methods.model import BASE
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.methods.sd import SD
from tests.gaussian_world import (
    Gaussian,
    ddim_chain,
    fuse_chains,
    mixed_eps_chain,
    moments,
    sd15_scheduler,
)
from tests.methods.gaussian_model import GaussianModel, exact_moments, sampled

MODELS = {BASE: Gaussian(0.5, 0.25), "warm": Gaussian(1.2, 0.2), "cool": Gaussian(-1, 0.3)}
ETAS = {"warm": 1.0, "cool": 0.9}
ONE = {"warm": 1.0, "cool": 0.0}
PROMPTS, SEEDS = ["a dog", "a cat"], [0, 1]
RUN = dict(num_inference_steps=4, guidance_scale=3.0)


def chains(base_eta, names):
    etas = {**ETAS, BASE: base_eta}
    return [ddim_chain(MODELS[name], etas[name], sd15_scheduler()) for name in names]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_db_kla_closed_form(strength):
    found = exact_moments(DBKLA(strength=strength, eta=0.8), MODELS, preference=ONE, etas=ETAS)
    experts, weights = [MODELS[BASE], MODELS["warm"]], [1 - strength, strength]
    expected = moments(mixed_eps_chain(experts, weights, 0.8, sd15_scheduler()))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5, 2.7])
def test_deradiff_closed_form(strength):
    found = exact_moments(
        DeRaDiff(strength=strength, base_eta=0.8), MODELS, preference=ONE, etas=ETAS
    )
    expected = fuse_chains(chains(0.8, [BASE, "warm"]), [1 - strength, strength])
    assert found == pytest.approx(moments(expected), rel=1e-9)


def test_mixing_predictions_in_deradiff_is_seen():
    """As public code does, for any etas: equal variances, which are DB-KLA's."""
    found = exact_moments(DeRaDiff(strength=0.5, base_eta=0.8), MODELS, preference=ONE, etas=ETAS)
    for eta in (0.8, 0.9, 1.0):
        wrong = exact_moments(DBKLA(strength=0.5, eta=eta), MODELS, preference=ONE, etas=ETAS)
        assert abs(found.mean - wrong.mean) > 0.02


@pytest.mark.parametrize("method", [DBKLA, DeRaDiff])
@pytest.mark.parametrize("w", [0.2, 0.7])
def test_several_objectives_share_the_strength(method, w):
    """p_base^(1 - lambda) prod_i p_i^(lambda w_i)."""
    found = exact_moments(
        method(strength=0.6), MODELS, preference={"warm": w, "cool": 1 - w}, etas=ETAS
    )
    weights = [0.4, 0.6 * w, 0.6 * (1 - w)]
    if method is DBKLA:
        expected = mixed_eps_chain(list(MODELS.values()), weights, 1.0, sd15_scheduler())
    else:
        expected = fuse_chains(chains(1.0, MODELS), weights)
    assert found == pytest.approx(moments(expected), abs=1e-12)


@pytest.mark.parametrize("method", [DBKLA, DeRaDiff])
def test_a_named_objective_is_alone_whatever_is_preferred(method):
    world = dict(models=MODELS, etas=ETAS)
    both = {"warm": 0.3, "cool": 0.7}
    named = exact_moments(method(strength=1.4, objective="warm"), **world, preference=both)
    assert named == exact_moments(method(strength=1.4), **world, preference=ONE)
    with pytest.raises(mf.UnknownObjective, match="'cold'; known: warm, cool"):
        exact_moments(method(objective="cold"), **world, preference=both)


def test_the_base_may_be_an_objective_too():
    world = dict(models=MODELS, etas={**ETAS, BASE: 0.8})
    found = exact_moments(
        DeRaDiff(strength=0.5, base_eta=0.8), **world, preference={BASE: 0.6, "warm": 0.4}
    )
    expected = fuse_chains(chains(0.8, [BASE, "warm"]), [0.5 + 0.5 * 0.6, 0.5 * 0.4])
    assert found == pytest.approx(moments(expected), abs=1e-12)


def test_strength_of_deradiff_is_bounded_and_that_of_db_kla_is_not():
    """1 / (1 - .8^2) = 2.78."""
    assert 2.77 < 1 / (1 - 0.8**2) < 2.79
    model = GaussianModel(MODELS, preference=ONE, etas=ETAS, num_steps=4)
    assert sampled(DeRaDiff(strength=2.77, base_eta=0.8), model).isfinite().all()
    assert sampled(DBKLA(strength=2.79), model).isfinite().all()
    with pytest.raises(mf.InvalidWeights, match="total precision"):
        sampled(DeRaDiff(strength=2.79, base_eta=0.8), model)
    assert sampled(DeRaDiff(strength=20, base_eta=1.0), model).isfinite().all()


@pytest.mark.parametrize("method", [DBKLA, DeRaDiff])
@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_strength_is_checked(method, strength):
    with pytest.raises(mf.InvalidWeights, match="strength must be at least 0"):
        method(strength=strength)


@pytest.mark.parametrize("method", [DBKLA, DeRaDiff])
def test_ends_are_the_base_and_the_aligned_model_bit_for_bit(pipe, method):
    base = method(strength=0.0)(pipe, PROMPTS, ONE, SEEDS, **RUN)
    assert torch.equal(base.images, SD()(pipe, PROMPTS, ONE, SEEDS, **RUN).images)
    aligned = method(strength=1.0)(pipe, PROMPTS, ONE, SEEDS, **RUN)
    with (
        torch.no_grad(),
        PipelineModel(pipe, PROMPTS, ONE, SEEDS, num_steps=4, guidance_scale=3.0) as model,
    ):
        expected = model.decode(model.generate({"warm": 1.0}, {"warm": 1.0}))
    assert torch.equal(aligned.images, expected)
    beyond = method(strength=1.5)(pipe, PROMPTS, ONE, SEEDS, **RUN)
    assert (beyond.images - aligned.images).abs().max() > 1e-2


def test_own_etas_in_deradiff_and_a_common_one_in_db_kla(pipe):
    """`cool` was aligned at eta .8; MSDDA with one-hot preference samples it so."""
    cool = {"warm": 0.0, "cool": 1.0}
    single = MSDDA()(pipe, PROMPTS, cool, SEEDS, **RUN).images
    own = DeRaDiff()(pipe, PROMPTS, cool, SEEDS, **RUN).images
    torch.testing.assert_close(own, single, rtol=0, atol=1e-5)
    assert (DBKLA()(pipe, PROMPTS, cool, SEEDS, **RUN).images - single).abs().max() > 1e-2

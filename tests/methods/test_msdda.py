# SPDX-License-Identifier: Apache-2.0
"""MSDDA: Eq. 7 in every step."""

import pytest

from msdda_fast.methods.msdda import MSDDA
from tests.gaussian_world import (
    Gaussian,
    ddim_chain,
    fuse_chains,
    mixed_eps_chain,
    moments,
    sd15_scheduler,
)
from tests.methods.gaussian_model import exact_moments

EXPERTS = {"warm": Gaussian(1, 0.25), "cool": Gaussian(-1, 0.25)}
ETAS = {"warm": 0.8, "cool": 1.0}


def preference(w: float) -> dict[str, float]:
    return {"warm": w, "cool": 1 - w}


@pytest.mark.parametrize("w", [0.2, 0.5, 0.8])
def test_closed_form_with_two_etas(w):
    scheduler = sd15_scheduler()
    chains = [ddim_chain(p, ETAS[name], scheduler) for name, p in EXPERTS.items()]
    expected = moments(fuse_chains(chains, [w, 1 - w]))
    found = exact_moments(MSDDA(), EXPERTS, preference=preference(w), etas=ETAS)
    assert found == pytest.approx(expected, abs=1e-12)


def test_mixing_predictions_instead_of_means_is_seen():
    """The likeliest wrong ports: one DDIM step of eps mixed by the shares of Eq. 7, or by w."""
    w = 0.2
    share = w / 0.8**2 / (w / 0.8**2 + (1 - w))
    eta_w = (w / 0.8**2 + (1 - w)) ** -0.5
    found = exact_moments(MSDDA(), EXPERTS, preference=preference(w), etas=ETAS)
    for mixture in ([share, 1 - share], [w, 1 - w]):
        wrong = moments(mixed_eps_chain(list(EXPERTS.values()), mixture, eta_w, sd15_scheduler()))
        assert abs(found.mean - wrong.mean) > 0.02


@pytest.mark.parametrize("name", ["warm", "cool"])
def test_one_hot_is_the_single_model(name):
    expected = moments(ddim_chain(EXPERTS[name], ETAS[name], sd15_scheduler()))
    found = exact_moments(
        MSDDA(), EXPERTS, preference={n: float(n == name) for n in EXPERTS}, etas=ETAS
    )
    assert found == pytest.approx(expected, abs=1e-12)


def test_every_active_model_costs_one_forward_per_step(pipe, calls):
    """Counted against the networks themselves."""
    pipe = type(pipe).from_pipe(pipe)
    pipe.set_forward("sequential")
    prompts, seeds = ["a dog", "a cat"], [0, 1]
    for weights, models in ((preference(0.3), 2), (preference(1.0), 1)):
        calls.clear()
        drawn = MSDDA()(pipe, prompts, weights, seeds, num_inference_steps=3, guidance_scale=1.0)
        assert len(calls) == models * 3
        assert drawn.cost.unet_forwards == len(prompts) * len(calls)

# SPDX-License-Identifier: Apache-2.0
"""What an image costs with each system that samples from aligned models, T steps at a time."""

import pytest

from msdda_fast.methods.db_kla import DBKLA
from msdda_fast.methods.db_mpa import DBMPA
from msdda_fast.methods.db_mpa_ls import DBMPALS
from msdda_fast.methods.deradiff import DeRaDiff
from msdda_fast.methods.model import Cost
from msdda_fast.methods.morl_oracle import MORLOracle
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.rewarded_soup import RewardedSoup
from msdda_fast.methods.sd import SD

T = 2
PROMPTS, SEEDS = ["a dog", "a cat", "a dog"], [0, 1, 2]

#: Models per step for two active objectives, and for one.
MODELS = {
    SD(): (1, 1),
    RewardedSoup(): (1, 1),
    MSDDA(): (2, 1),
    MSDDA(fusion="eps"): (2, 1),
    DBMPA(): (2, 1),
    DBMPA(remapped=True): (2, 1),
    DBMPALS(): (1, 1),
    DBKLA(strength=0.5): (3, 2),
    DBKLA(strength=0.5, objective="warm"): (2, 2),
    DBKLA(strength=1.0): (2, 1),
    DeRaDiff(strength=0.5, objective="warm"): (2, 2),
    DeRaDiff(strength=1.5): (3, 2),
}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("method", MODELS, ids=lambda method: repr(method))
def test_cost_is_the_formula(pipe, method, guidance_scale):
    """T pairs per model that runs, a decode, no reward; without guidance a pair is one forward."""
    for weights, models in zip(
        ({"warm": 0.3, "cool": 0.7}, {"warm": 1.0, "cool": 0.0}), MODELS[method], strict=True
    ):
        drawn = method(
            pipe, PROMPTS, weights, SEEDS, num_inference_steps=T, guidance_scale=guidance_scale
        )
        pairs = len(PROMPTS) * T * models
        assert drawn.cost == Cost(
            unet_forwards=pairs * (1 if guidance_scale == 1.0 else 2), decodes=len(PROMPTS)
        )


def test_cost_of_the_oracle(tiny, pipe):
    method = MORLOracle(objective="warm", adapters={0.3: tiny.warm})
    drawn = method(
        pipe, PROMPTS, {"warm": 0.3, "cool": 0.7}, SEEDS, num_inference_steps=T, guidance_scale=3.0
    )
    assert drawn.cost == Cost(unet_forwards=2 * T * len(PROMPTS), decodes=len(PROMPTS))


@pytest.mark.parametrize(
    "method", [RewardedSoup(), DBMPA(), DBKLA(strength=0.5), DeRaDiff(strength=0.5)], ids=repr
)
def test_what_is_counted_is_what_runs(pipe, calls, method):
    """Against the networks themselves: with one image, one forward a time, they run as counted."""
    pipe = type(pipe).from_pipe(pipe)
    pipe.set_forward("sequential")
    calls.clear()
    weights = {"warm": 0.3, "cool": 0.7}
    drawn = method(pipe, PROMPTS[:1], weights, [0], num_inference_steps=T, guidance_scale=1.0)
    assert drawn.cost.unet_forwards == len(calls)

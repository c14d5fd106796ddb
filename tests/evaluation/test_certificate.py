# SPDX-License-Identifier: Apache-2.0
"""The lambda certificate: exact for exact optima of Eq. (3), and only for them."""

from dataclasses import dataclass

import numpy as np
import pytest

from msdda_fast.errors import InvalidSchedule
from msdda_fast.evaluation.certificate import base_paths, certificate
from msdda_fast.methods.model import BASE
from tests.gaussian_world import Gaussian, ddim_chain, grid, responses, sd15_scheduler, var_ddpm
from tests.methods.gaussian_model import GaussianModel

STEPS, ETA, SLOPE, LAMBDA = 12, 0.8, 1.7, 0.05
DATA = Gaussian(0.3, 0.25)


@dataclass(frozen=True)
class Optimum:
    """The optimum of Eq. (3) for r = SLOPE x_0: the mean moves by sigma^2 grad V / lambda."""

    shifts: dict[float, float]  # of the noise prediction, by alpha_bar

    def eps_affine(self, alpha_bar):
        slope, offset = DATA.eps_affine(alpha_bar)
        return slope, offset + self.shifts[alpha_bar]


def optimum():
    scheduler = sd15_scheduler()
    steps = grid(scheduler, STEPS)
    gains = responses(ddim_chain(DATA, ETA, scheduler, STEPS))
    shifts = {}
    for (_, a, b), (gain, _) in zip(steps, gains, strict=True):
        var = ETA**2 * var_ddpm(a, b)
        on_eps = (1 - b - var) ** 0.5 - (b * (1 - a) / a) ** 0.5
        shifts[a] = var * SLOPE * gain / LAMBDA / on_eps
    return Optimum(shifts)


def measured(aligned, reward=lambda x: SLOPE * x, **more):
    model = GaussianModel(
        {BASE: DATA, "mine": aligned}, {"r": 1.0}, {"mine": ETA}, {"r": reward}, batch_size=6,
        num_steps=STEPS, **more,
    )  # fmt: skip
    paths = base_paths(model, ETA, ["mine"], 5)
    columns = (paths.rewards["r"], paths.gains["mine"], paths.kl["mine"])
    return certificate(*(column.T.reshape(3, 2, 5).numpy() for column in columns))


def test_of_an_exact_optimum_the_slope_is_lambda_and_nothing_is_left():
    found = measured(optimum())
    assert found.kl_weight == pytest.approx([LAMBDA] * 3, rel=1e-9)
    assert found.r_squared == pytest.approx([1.0] * 3, rel=1e-9)


def test_the_kl_of_an_exact_optimum_is_the_closed_form():
    scheduler = sd15_scheduler()
    gains = responses(ddim_chain(DATA, ETA, scheduler, STEPS))
    wanted = sum(
        ETA**2 * var_ddpm(a, b) * (SLOPE * gain / LAMBDA) ** 2 / 2
        for (_, a, b), (gain, _) in zip(grid(scheduler, STEPS), gains, strict=True)
    )
    assert measured(optimum()).kl == pytest.approx(wanted, rel=1e-9)


def test_of_another_adapter_something_is_left():
    assert measured(Gaussian(0.6, 0.1)).r_squared.high < 0.99
    half = measured(optimum(), acts={"mine": [k % 2 == 0 for k in range(STEPS)]})
    assert half.r_squared.high < 0.99


def test_a_network_that_is_the_base_certifies_nothing():
    found = measured(DATA)
    assert found == ((0, 0, 0), (0, 0, 0), 0)


def test_intervals_cover_the_slope_of_noisy_rewards():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(40):
        gains = rng.normal(size=(12, 3, 4))
        tilt = rng.normal(0, 0.3, size=(12, 1, 1))  # lambda differs among prompts
        rewards = (2 + tilt) * gains + rng.normal(size=gains.shape) + rng.normal(size=(12, 3, 1))
        low, high = certificate(rewards, gains, gains).kl_weight[1:]
        covered += low <= 2 <= high
    assert covered >= 33


@pytest.mark.parametrize(("eta", "paths"), [(0.0, 2), (1.0, 1)])
def test_what_cannot_be_certified_is_refused(eta, paths):
    model = GaussianModel({BASE: DATA}, num_steps=STEPS)
    with pytest.raises((InvalidSchedule, ValueError), match="a certificate needs"):
        base_paths(model, eta, [], paths)

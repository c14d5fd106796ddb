# SPDX-License-Identifier: Apache-2.0
"""The test bed itself agrees with the published numbers of its closed forms."""

import math

import pytest

from tests.gaussian_world import (
    Gaussian,
    aligned_chain,
    ddim_chain,
    fuse_chains,
    mixed_eps_chain,
    moments,
    sd15_scheduler,
    var_ddpm,
)

HALF = 0.5e-7  # the numbers below are quoted to seven digits


def test_schedule_is_stable_diffusion_15() -> None:
    alpha_bar = sd15_scheduler().alphas_cumprod
    assert float(alpha_bar[981]) == pytest.approx(0.0057755, abs=HALF)
    assert float(alpha_bar[1]) == pytest.approx(0.998296, abs=0.5e-6)
    assert float(alpha_bar[0]) == pytest.approx(0.99915, abs=0.5e-6)
    assert var_ddpm(alpha_bar[981], alpha_bar[961]) == pytest.approx(0.2065369, abs=HALF)
    assert var_ddpm(alpha_bar[481], alpha_bar[461]) == pytest.approx(0.0827628, abs=HALF)
    assert math.sqrt(var_ddpm(alpha_bar[1], alpha_bar[0])) == pytest.approx(0.02064832, abs=HALF)


@pytest.mark.parametrize(
    ("eta", "mean", "var"),
    [(1.0, 0.4990602, 0.2057384), (0.8, 0.4973163, 0.2154353), (0.0, 0.4816025, 0.2290325)],
)
def test_one_model(eta: float, mean: float, var: float) -> None:
    chain = ddim_chain(Gaussian(0.5, 0.25), eta, sd15_scheduler())
    assert moments(chain) == pytest.approx((mean, var), abs=HALF)


def test_two_models_at_500_steps_approach_the_continuous_limit() -> None:
    scheduler, experts = sd15_scheduler(), [Gaussian(1, 0.25), Gaussian(-1, 0.25)]
    chains = [ddim_chain(p, eta, scheduler, 500) for p, eta in zip(experts, (0.8, 1), strict=True)]
    assert moments(fuse_chains(chains, [0.5, 0.5])) == pytest.approx((0.12333, 0.24457), abs=0.5e-5)
    effective = [0.5 * (1 + 0.8**-2), 0.5 * (1 + 1.0**-2)]
    effective = [share / sum(effective) for share in effective]
    eta_w = (0.5 / 0.8**2 + 0.5) ** -0.5
    mixed = mixed_eps_chain(experts, effective, eta_w, scheduler, 500)
    assert moments(mixed) == pytest.approx((0.12293, 0.24466), abs=0.5e-5)


def test_fusing_a_model_with_itself_under_two_etas_loses_a_little_variance() -> None:
    scheduler, data = sd15_scheduler(), Gaussian(0.5, 0.25)
    chains = [ddim_chain(data, eta, scheduler) for eta in (0.8, 1.0)]
    assert moments(fuse_chains(chains, [0.5, 0.5])).var == pytest.approx(0.21121, abs=0.5e-5)
    eta_w = (0.5 / 0.8**2 + 0.5) ** -0.5
    assert moments(ddim_chain(data, eta_w, scheduler)).var == pytest.approx(0.21202, abs=0.5e-5)


def test_aligned_variances_differ_from_step_to_step() -> None:
    base = ddim_chain(Gaussian(0.5, 0.25), 1.0, sd15_scheduler())
    first = aligned_chain(base, [(1, 40, 1)], kl_weight=0.1)
    second = aligned_chain(base, [(1, 0.5, -1)], kl_weight=0.1)
    ratios = [math.sqrt(a.var / b.var) for a, b in zip(first, second, strict=True)]
    assert (min(ratios), max(ratios)) == pytest.approx((0.427, 0.982), abs=0.5e-3)

# SPDX-License-Identifier: Apache-2.0
"""The Euler ancestral rule against its definition, k-diffusion's, and diffusers' own step."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

import msdda_fast as mf
from msdda_fast.steps.ancestral import ancestral_rule
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.table import rule_table
from tests.gaussian_world import sd15_scheduler

SIGMAS = torch.tensor([14.6, 6.0, 2.5, 1.0, 0.4, 0.03, 0.0], dtype=torch.float64)
WEIGHTS = [0.5, 0.3, 0.2]


def ancestral_step(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """k-diffusion's `get_ancestral_step`: sigma_down and sigma_up."""
    up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def table(etas: list[float], **options: object) -> CoefficientTable:
    return rule_table(ancestral_rule(SIGMAS), levels=etas, weights=WEIGHTS, **options)


@pytest.mark.parametrize("s_noise", [1.0, 0.9])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.05, 7.0])
def test_it_is_k_diffusions_step(eta: float, s_noise: float) -> None:
    """x + (x - D) / s (down - s) + s_noise up z, and exactly no x where all of it is noise."""
    terms = ancestral_rule(SIGMAS, s_noise).step(torch.tensor([eta], dtype=torch.float64))
    for k, (s, r) in enumerate(pairwise(SIGMAS.tolist())):
        down, up = ancestral_step(s, r, eta)
        assert terms.x_scale[k].item() == pytest.approx(1 + (down - s) / s, abs=1e-15)
        assert terms.output_scale[k].item() == pytest.approx(-(down - s) / s, abs=1e-15)
        assert terms.std[k].item() == pytest.approx(s_noise * up, rel=1e-14)
        if up == r:
            assert terms.x_scale[k].item() == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_it_is_diffusers_step(spacing: str) -> None:
    scheduler = EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing=spacing
    )
    scheduler.set_timesteps(9)
    terms = ancestral_rule(scheduler.sigmas).step(torch.ones(1, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    for k, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[k].double()
        eps = torch.randn(2, 4, 5, generator=generator)
        x = torch.randn(2, 4, 5, generator=generator) * (1 + sigma).float()
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k)).double()
        drawn = torch.Generator().manual_seed(k)
        expected = scheduler.step(eps, t, x, generator=drawn).prev_sample.double()
        denoised = x.double() - sigma * eps.double()
        found = terms.x_scale[k] * x + terms.output_scale[k] * denoised + terms.std[k] * z
        assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()  # float32 inside


def test_the_networks_are_asked_at_sigmas() -> None:
    """Timesteps that are no integers stay floating, in the dtype of the rows."""
    for dtype in (torch.float32, torch.float64):
        built = table([1.0, 0.8, 0.5], dtype=dtype)
        assert built.timesteps.dtype == dtype
        assert built.timesteps.equal(SIGMAS[:-1].to(dtype))
    moved = built.to("meta", torch.float16)
    assert moved.timesteps.dtype == torch.float64 and moved.timesteps.device.type == "meta"


def test_shares_depend_on_the_step_only_where_an_eta_is_clipped() -> None:
    plain = table([1.0, 0.8, 0.5]).share
    ddim = mf.coefficient_table(sd15_scheduler(), 6, etas=[1.0, 0.8, 0.5], weights=WEIGHTS)
    torch.testing.assert_close(plain, ddim.share, rtol=1e-14, atol=0)
    clipped = table([2.0, 0.8, 0.5]).share
    assert clipped[:, 0, 0].diff().abs().max() > 0.01
    torch.testing.assert_close(clipped[-1], plain[-1], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("policy", "rates", "share"),
    [
        ("dominate", None, [0.6, 0.4, 0.0]),
        ("ratio", [1.0, 2.0, 1.0], [6 / 7, 1 / 7, 0.0]),
    ],
)
def test_vanishing_noise_follows_the_policy(policy, rates, share) -> None:
    built = rule_table(
        ancestral_rule(SIGMAS),
        levels=[0.0, 0.0, 1.0],
        weights=[0.48, 0.32, 0.2],
        zero_variance=policy,
        rates=rates,
    )
    for row in built.share[:, 0].tolist():
        assert row == pytest.approx(share, rel=1e-12)
    assert not built.std.any()


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_mixture_is_what_the_shares_say(batch_size: int | None) -> None:
    built = table([1.0, 0.8, 0.5], batch_size=batch_size)
    x, outputs = torch.randn(2, 4, 3), torch.randn(3, 1, 2, 4, 3)
    nan = torch.full_like(x, math.nan)  # neither state nor noise counts
    mixed = mf.fused_ddim_step(nan, outputs, built.mixture(2), noise=nan)
    expected = torch.einsum("m,mbcd->bcd", built.share[2, 0].float(), outputs[:, 0])
    torch.testing.assert_close(mixed, expected)
    assert x.shape == mixed.shape


@pytest.mark.parametrize(
    ("sigmas", "s_noise", "error", "message"),
    [
        ([1.0], 1.0, mf.InvalidShape, r"shape \(1,\), expected \(T \+ 1,\)"),
        ([[1.0, 0.0]], 1.0, mf.InvalidShape, r"shape \(1, 2\)"),
        ([1.0, 2.0], 1.0, mf.InvalidSchedule, "not increase"),
        ([1.0, 0.0, 0.0], 1.0, mf.InvalidSchedule, "positive but for a last 0"),
        ([1.0, -1.0], 1.0, mf.InvalidSchedule, "positive but for a last 0"),
        ([math.nan, 0.0], 1.0, mf.InvalidSchedule, "finite"),
        ([1.0, 0.0], -0.1, mf.InvalidSchedule, "s_noise must be finite and not negative, got -0.1"),
        ([1.0, 0.0], math.inf, mf.InvalidSchedule, "s_noise"),
    ],
)
def test_bad_settings_are_named(sigmas, s_noise, error, message) -> None:
    with pytest.raises(error, match=message):
        ancestral_rule(sigmas, s_noise)


@pytest.mark.parametrize("eta", [-0.1, math.inf, math.nan])
def test_a_level_out_of_range_is_named(eta: float) -> None:
    with pytest.raises(mf.InvalidSchedule, match=rf"objective 2: eta must lie in .*got {eta}; "):
        table([1.0, 7.0, eta])

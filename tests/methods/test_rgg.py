# SPDX-License-Identifier: Apache-2.0
"""RGG: reward gradients of x0hat, tempered, times the variance of the step."""

import math

import pytest
import torch

from msdda_fast.methods.model import BASE
from msdda_fast.methods.rgg import RGG
from tests.gaussian_world import ddim_chain, moments, sd15_scheduler
from tests.methods.gaussian_model import GaussianModel, exact_moments, sampled
from tests.methods.guided_world import (
    DATA,
    guided_steps,
    linear,
    plain,
    quadratic,
    shift,
    world,
)


def temper(i: int, gamma: float = 0.024) -> float:
    return min((1 + gamma) ** i - 1, 1)


def x0hat_per_x(step, jacobian):
    return 1 / math.sqrt(step.a) if jacobian == "detached" else step.jacobian


@pytest.mark.parametrize("eta", [1.0, 0.8])
@pytest.mark.parametrize("jacobian", ["detached", "unet"])
def test_closed_form_of_linear_rewards(jacobian, eta):
    """h is the constant d x0hat/d x_t times sum_j w_j b_j / alpha: the mean moves, no more."""
    method = RGG(jacobian=jacobian, norm="none", eta=eta)
    found = exact_moments(
        method,
        {BASE: DATA},
        preference={"up": 0.75, "down": 0.25},
        scalar_rewards={"up": linear(0.3), "down": linear(-0.1)},
    )
    base = moments(ddim_chain(DATA, eta, sd15_scheduler()))
    per_slope = sum(
        step.gain * temper(i) * step.var * x0hat_per_x(step, jacobian)
        for i, step in enumerate(guided_steps(eta))
    )
    slope = (0.75 * 0.3 - 0.25 * 0.1) / 0.1
    assert found.mean - base.mean == pytest.approx(slope * per_slope, rel=1e-10)
    assert found.var == pytest.approx(base.var, rel=1e-10)


@pytest.mark.parametrize("eta", [1.0, 0.8])
def test_likely_wrong_ports_land_elsewhere(eta):
    steps = guided_steps(eta)
    right = sum(s.gain * temper(i) * s.var / math.sqrt(s.a) for i, s in enumerate(steps))
    found = shift(RGG(norm="none", eta=eta, alpha=1.0), linear(1.0))
    assert found == pytest.approx(right, rel=1e-10)
    wrong = {
        "reward of the noisy latents": sum(s.gain * temper(i) * s.var for i, s in enumerate(steps)),
        "no variance": sum(s.gain * temper(i) / math.sqrt(s.a) for i, s in enumerate(steps)),
        "standard deviation": sum(
            s.gain * temper(i) * math.sqrt(s.var) / math.sqrt(s.a) for i, s in enumerate(steps)
        ),
        "no tempering": sum(s.gain * s.var / math.sqrt(s.a) for s in steps),
        "tempering one step early": sum(
            s.gain * temper(i + 1) * s.var / math.sqrt(s.a) for i, s in enumerate(steps)
        ),
        "through the network": sum(
            s.gain * temper(i) * s.var * s.jacobian for i, s in enumerate(steps)
        ),
        "gradient added to x_t": sum(
            s.gain * s.on_x * temper(i) * s.var / math.sqrt(s.a) for i, s in enumerate(steps)
        ),
    }
    if eta != 1:
        wrong["v without eta^2"] = right / eta**2
    for port, value in wrong.items():
        assert abs(value / found - 1) > 0.02, port


@pytest.mark.parametrize("norm", ["pixel", "global"])
def test_a_normalised_gradient_knows_no_alpha(norm):
    strong, weak = (
        sampled(RGG(norm=norm, alpha=alpha), world(quadratic(0.5, 2.0), batch_size=4))
        for alpha in (0.01, 10.0)
    )
    torch.testing.assert_close(strong, weak, rtol=1e-12, atol=1e-12)
    raw = [shift(RGG(norm="none", alpha=alpha), linear(0.1)) for alpha in (0.1, 1.0)]
    assert raw[0] == pytest.approx(10 * raw[1])


def test_each_reward_is_normalised_before_they_are_mixed():
    """A reward a thousand times larger has its preference, not a thousand times that."""
    per_unit = sum(step.gain * temper(i) * step.var for i, step in enumerate(guided_steps()))
    found = shift(RGG(), linear(1.0), linear(-1000.0), weights=[0.8, 0.2])
    assert found == pytest.approx((0.8 - 0.2) * per_unit, rel=1e-10)


class Pixels(GaussianModel):
    """Samples of 4 channels and 2 x 2 pixels, and one linear reward of them all."""

    slopes = torch.arange(1.0, 17, dtype=torch.float64).view(4, 2, 2)

    def _draw(self, k, purpose, copy):
        return torch.zeros(self.batch_size, 4, 2, 2, dtype=torch.float64)

    def rewards(self, images, rows=None):
        return {"r": (self.slopes * images).sum((1, 2, 3))}


@pytest.mark.parametrize("norm", ["pixel", "global"])
def test_the_norm_is_over_the_channels_of_a_pixel_or_over_the_sample(norm):
    model = Pixels({BASE: DATA}, preference={"r": 1.0}, batch_size=2)
    with torch.no_grad():
        found = RGG(norm=norm).sample(model) - plain(model)
    slopes = Pixels.slopes
    length = slopes.norm(dim=0) if norm == "pixel" else slopes.norm()
    per_unit = sum(step.gain * temper(i) * step.var for i, step in enumerate(guided_steps()))
    torch.testing.assert_close(found, (per_unit * slopes / length).expand(2, 4, 2, 2))


def test_where_nothing_pulls_nothing_moves():
    """A gradient of 0 has no direction: normalised, it stays 0."""
    for norm in ("pixel", "global", "none"):
        assert shift(RGG(norm=norm), linear(0.0)) == 0


@pytest.mark.parametrize("jacobian", ["detached", "unet"])
@pytest.mark.parametrize("zero", [{"gamma": 0.0}, {"eta": 0.0}], ids=str)
def test_no_guidance_is_the_base(jacobian, zero):
    method = RGG(jacobian=jacobian, **zero)
    found = sampled(method, world(quadratic(1.0, 3.0), batch_size=3))
    assert torch.equal(found, plain(world(linear(0.0), batch_size=3), method.eta)[:, 0])


@pytest.mark.parametrize(
    ("settings", "backwards"),
    [
        ({}, 0),
        ({"jacobian": "unet"}, 2),
        ({"jacobian": "unet", "norm": "none"}, 1),
    ],
    ids=str,
)
def test_cost(settings, backwards):
    model = world(linear(1.0), linear(2.0), batch_size=3)
    sampled(RGG(**settings), model)
    images, steps, rewards = 3, 50, 2
    assert model.cost.unet_forwards == images * steps
    assert model.cost.unet_backwards == images * steps * backwards
    assert model.cost.decodes == images * (steps + 1)
    assert model.cost.reward_calls == images * steps * rewards


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jacobian": "full"}, "jacobian must be one of .*'full'"),
        ({"norm": "channel"}, "norm must be one of .*'channel'"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"gamma": -0.1}, "gamma must be 0 or more"),
        ({"eta": 1.1}, "eta must lie in"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RGG(**settings)

# SPDX-License-Identifier: Apache-2.0
"""The DDIM rule against diffusers' own step, one eta at a time and many at once."""

import pytest
import torch
from diffusers import DDIMScheduler

from msdda_fast.steps.ddim import DDIMRule, ddim_grid
from msdda_fast.steps.rules import MixingRule
from tests.gaussian_world import sd15_scheduler

T = 9
ETAS = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)


def rule_of(scheduler: DDIMScheduler) -> DDIMRule:
    return DDIMRule(ddim_grid(scheduler, T))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip_range", [None, 0.7], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("to_one", [False, True], ids=["to alpha_0", "to one"])
def test_it_is_diffusers_step(prediction_type: str, clip_range, to_one: bool) -> None:
    scheduler = sd15_scheduler(
        prediction_type=prediction_type,
        clip_sample=clip_range is not None,
        clip_sample_range=clip_range or 1.0,
        set_alpha_to_one=to_one,
    )
    terms = rule_of(scheduler).step(ETAS)
    scheduler.set_timesteps(T)
    generator = torch.Generator().manual_seed(0)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        x, m, z = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
        for i, eta in enumerate(ETAS.tolist()):
            expected = scheduler.step(m, t, x, eta=eta, variance_noise=z).prev_sample
            scales = (terms.x_scale, terms.output_scale, terms.std)
            a, b, tau = (scale.expand(T, 1, len(ETAS))[k, 0, i] for scale in scales)
            found = a * x + b * m + tau * z
            if clip_range is not None:
                x0 = terms.clean.x[k] * x + terms.clean.output[k] * m
                found += terms.clean.scale[k] * x0.clamp(-clip_range, clip_range)
            assert (found - expected).abs().max() <= 1e-14 * max(1.0, float(expected.abs().max()))


def test_rates_are_the_etas_also_where_no_noise_is_left() -> None:
    terms = rule_of(sd15_scheduler(set_alpha_to_one=True)).step(ETAS)
    assert terms.rate.equal(ETAS)
    assert not terms.std[-1].any() and (terms.std[:-1, 0, 1:] > 0).all()


def test_a_level_may_differ_by_step_and_sample() -> None:
    rule = rule_of(sd15_scheduler())
    level = torch.rand(T, 3, 1, dtype=torch.float64)
    terms = rule.step(level)
    for k in range(T):
        for b in range(3):
            alone = rule.step(level[k, b])
            assert terms.x_scale.expand(T, 3, 1)[k, b].equal(alone.x_scale[k, 0])
            assert terms.output_scale[k, b].equal(alone.output_scale[k, 0])
            assert terms.std[k, b].equal(alone.std[k, 0])


def test_it_says_what_a_noise_prediction_counts() -> None:
    """Up to a factor per step, the coefficient of an epsilon output."""
    rule = rule_of(sd15_scheduler())
    assert isinstance(rule, MixingRule)
    coefficient, scale = rule.step(ETAS).output_scale, rule.eps_scale(ETAS)
    quotient = coefficient / scale
    torch.testing.assert_close(quotient, quotient[..., :1].expand_as(quotient), rtol=1e-9, atol=0)
    assert rule.step_at(ETAS).output_scale.equal(coefficient)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_step_of_no_length_leaves_x(prediction_type: str) -> None:
    """alpha_bar_prev = alpha_bar_t in the last step of some spacings."""
    scheduler = sd15_scheduler(prediction_type=prediction_type, steps_offset=0)
    terms = rule_of(scheduler).step(ETAS)
    assert terms.x_scale.expand(T, 1, 4)[-1].tolist() == [pytest.approx([1.0] * 4, abs=1e-15)]
    assert terms.output_scale.expand(T, 1, 4)[-1].abs().max() < 1e-15
    assert not terms.std[-1].any()

# SPDX-License-Identifier: Apache-2.0
"""Strength and timestep ranges: what the base contributes, against closed forms."""

import math

import pytest
import torch

import msdda_fast as mf
from msdda_fast import InvalidSchedule, InvalidShape, InvalidWeights, coefficient_table
from msdda_fast.levels import FlowSDE
from msdda_fast.steps.shares import fusion_shares
from msdda_fast.steps.strength import relative_strength
from tests.gaussian_world import (
    Gaussian,
    Step,
    ddim_chain,
    fuse_chains,
    measured_moments,
    moments,
    sd15_scheduler,
)
from tests.steps.flow_world import flow_scheduler

ETAS = (1.0, 0.8)
WEIGHTS = (0.3, 0.7)
BASE, WORLDS = Gaussian(0.0, 1.0), (Gaussian(1.0, 0.8), Gaussian(-0.5, 1.3))


def table(strength=None, **options):
    given = {"etas": ETAS, "weights": WEIGHTS, "guidance_scale": (3.0, 2.0)} | options
    return coefficient_table(sd15_scheduler(), 10, strength=strength, dtype=torch.float64, **given)


def expected_chain(strength) -> list[Step]:
    """Eq. 7 of brackets (1 - s) base + s objective, each at the objective's own eta."""
    brackets = []
    for s, eta, world in zip(strength, ETAS, WORLDS, strict=True):
        own, base = (ddim_chain(g, eta, sd15_scheduler()) for g in (world, BASE))
        brackets.append([
            Step(s * a.scale + (1 - s) * b.scale, s * a.shift + (1 - s) * b.shift, a.var)
            for a, b in zip(own, base, strict=True)
        ])  # fmt: skip
    return fuse_chains(brackets, WEIGHTS)


@pytest.mark.parametrize("strength", [(1.0, 1.0), (0.0, 0.0), (1.5, 0.5), (3.0, 3.0)])
def test_moments_are_those_of_brackets_with_the_base(strength) -> None:
    scheduler = sd15_scheduler()

    def sample(x_T, noise):
        return mf.denoise(
            [world.denoiser(scheduler) for world in WORLDS],
            x_T,
            scheduler=scheduler,
            etas=ETAS,
            weights=WEIGHTS,
            noise=noise,
            strength=strength,
            base=BASE.denoiser(scheduler),
        )

    found, wanted = measured_moments(sample), moments(expected_chain(strength))
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_of_one_it_is_eq_7_to_the_bit_and_the_base_has_no_influence() -> None:
    plain, one = table(), table(1.0)
    layout, wide = plain[0].layout, one[0].layout
    assert one.has_base and not one.influence[:, -1].any() and one.active == [True, True, False]
    for name in ("uncond", "cond"):
        columns = one.rows[..., getattr(wide, name)]
        assert columns[..., :2].equal(plain.rows[..., getattr(layout, name)])
        assert not columns[..., 2].any()
    assert one.rows[..., 0].equal(plain.rows[..., 0])


@pytest.mark.parametrize("scheduler", ["ddim", "flow"])
def test_no_strength_changes_the_noise_and_an_objective_equal_to_the_base_is_left_alone(
    scheduler,
) -> None:
    given = {} if scheduler == "ddim" else {"etas": None, "levels": [FlowSDE(0.7), FlowSDE(0.4)]}
    made = sd15_scheduler() if scheduler == "ddim" else flow_scheduler(10)
    arguments = {"etas": ETAS, "weights": WEIGHTS, "dtype": torch.float64} | given
    plain = coefficient_table(made, 10, **arguments)
    strong = coefficient_table(made, 10, strength=(2.5, 0.25), **arguments)
    assert strong.std.equal(plain.std)
    # outputs that are all the same: what they count together is what they counted
    total = [t.rows[..., t[0].layout.cond].sum(-1) for t in (plain, strong)]
    assert total[1] == pytest.approx(total[0], rel=1e-12)
    assert strong.share.sum(-1) == pytest.approx(torch.ones(10, 1), rel=1e-12)


def test_the_recipe_for_other_samplers_is_the_same_step() -> None:
    """Twice as many experts: each objective at w s, and the base at its level at w (1 - s)."""
    strength, v = torch.tensor([2.0, 0.5], dtype=torch.float64), 0.1
    generator = torch.Generator().manual_seed(0)
    own, base = (torch.randn(2, 1, 5, generator=generator).double() for _ in range(2))
    eta, w = (torch.tensor(values, dtype=torch.float64) for values in (ETAS, WEIGHTS))
    step = mf.fast_fuse_step(
        [*own, *base],
        (v * eta**2).repeat(2),
        torch.cat([w * strength, w * (1 - strength)]),
        noise=torch.zeros(1, 5, dtype=torch.float64),
        return_moments=True,
        extrapolate=True,
    )
    share, eta_w = fusion_shares(w, eta)
    bracket = strength[:, None, None] * own + (1 - strength)[:, None, None] * base
    assert step.mean == pytest.approx((share[:, None, None] * bracket).sum(0), rel=1e-12)
    assert float(step.variance.flatten()[0]) == pytest.approx(float(v * eta_w**2), rel=1e-12)


def test_kl_weights_give_the_optimum_at_one_lambda() -> None:
    """For linear rewards b_i x, p_i = N(mu + v b_i / lambda_i, v); 9.1's product is N(.., v)."""
    mu, v, slopes, lambdas = 0.2, 0.3, torch.tensor([1.0, -2.0]).double(), (0.05, 0.2)
    w, lam = torch.tensor(WEIGHTS).double(), torch.tensor(lambdas).double()
    target = float((w * lam).sum())
    optimum = mu + v * float((w * slopes).sum()) / target
    s = relative_strength(lambdas, w)
    means = mu + v * slopes / lam
    assert float((w * (s * means + (1 - s) * mu)).sum()) == pytest.approx(optimum, rel=1e-12)
    assert float((w * s).sum()) == pytest.approx(1)  # exponents
    assert relative_strength((0.1, 0.1), w).tolist() == pytest.approx([1, 1])


def test_outside_of_its_timesteps_an_objective_is_the_base() -> None:
    made = table(ranges=[(400, 999), None])
    inside = made.timesteps >= 400
    plain, layout, wide = table(), table()[0].layout, made[0].layout
    cond, own = made.rows[..., wide.cond], plain.rows[..., layout.cond]
    assert cond[inside][..., :2].equal(own[inside]) and not cond[inside][..., 2].any()
    assert not cond[~inside][..., 0].any() and cond[~inside][..., 1].equal(own[~inside][..., 1])
    assert cond[~inside][..., 2] == pytest.approx(own[~inside][..., 0])
    assert made.influence.tolist() == [[on, True, not on] for on in inside.tolist()]


def test_samples_have_strengths_of_their_own() -> None:
    both = table([[1.0, 2.0], [0.0, 0.5]])
    for b, strength in enumerate(([1.0, 2.0], [0.0, 0.5])):
        assert both.rows[:, b].equal(table(strength).rows[:, 0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strength": -0.5}, InvalidWeights, "finite and not negative"),
        ({"strength": [1.0, math.nan]}, InvalidWeights, "finite and not negative"),
        ({"strength": [1.0] * 3}, InvalidShape, r"strength has shape \(3,\)"),
        ({"ranges": [(0, 999)]}, InvalidShape, "1 ranges of timesteps for M = 2"),
        ({"ranges": [(900, 100), None]}, InvalidSchedule, "such as"),
        ({"strength": [[1.0, 1.0]] * 3, "weights": [WEIGHTS] * 2}, InvalidShape, "disagree"),
    ],
)
def test_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        table(**options)


def test_clipped_predictions_cannot_be_mixed() -> None:
    clipped = sd15_scheduler(clip_sample=True)
    with pytest.raises(InvalidSchedule, match="clip"):
        coefficient_table(clipped, 10, etas=ETAS, weights=WEIGHTS, strength=2.0)


def test_strength_without_the_base_is_refused() -> None:
    with pytest.raises(ValueError, match="together"):
        mf.denoise([lambda x, t: x], torch.zeros(1, 2), scheduler=sd15_scheduler(), strength=2.0)


def test_an_objective_says_its_timesteps() -> None:
    assert mf.Objective("a", timesteps=[500, 999]).timesteps == (500.0, 999.0)
    with pytest.raises(InvalidSchedule, match="timesteps must be"):
        mf.Objective("a", timesteps=(999, 500))

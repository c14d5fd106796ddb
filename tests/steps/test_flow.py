# SPDX-License-Identifier: Apache-2.0
"""The rules of flow models against the steps that their trainers publish, and what follows."""

import math
from functools import partial
from types import MappingProxyType

import pytest
import torch

import msdda_fast as mf
from msdda_fast import InvalidSchedule, InvalidWeights, ZeroVariance
from msdda_fast.levels import FlowNoise, read_levels
from msdda_fast.reference import fuse_posteriors
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.schedulers import scheduler_rule
from tests.gaussian_world import Gaussian, Moments, fuse_chains, measured_moments, moments
from tests.steps.flow_world import (
    chain,
    cps,
    dance,
    flow_ddim,
    flow_grpo,
    flow_scheduler,
    times,
    velocity,
)

T = 10
WEIGHTS = [0.3, 0.7]
LEVELS = (0.9, 0.4)
SDES = [mf.FlowSDE, mf.DanceSDE]
ALL = [*SDES, mf.CPS, mf.FlowDDIM]
by_kind = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
by_sde = pytest.mark.parametrize("kind", SDES, ids=lambda kind: kind.__name__)


def published(kind: type[FlowNoise], scheduler: object):
    sigma_max = float(scheduler.sigmas[1])
    return {
        mf.FlowSDE: partial(flow_grpo, sigma_max=sigma_max),
        mf.DanceSDE: dance,
        mf.CPS: cps,
        mf.FlowDDIM: flow_ddim,
    }[kind]


def table(
    kind, levels=LEVELS, num_steps=T, weights=WEIGHTS, settings=MappingProxyType({}), **options
) -> CoefficientTable:
    return mf.coefficient_table(
        flow_scheduler(num_steps),
        None,
        levels=[kind(level, **settings) for level in levels],
        weights=weights,
        dtype=torch.float64,
        **options,
    )


def columns(built: CoefficientTable, k: int) -> tuple[float, list[float], float]:
    """A, B per objective and tau of step k."""
    layout, row = built[k].layout, built[k].row[0]
    return float(row[layout.x_scale]), row[layout.cond].tolist(), float(row[layout.noise_scale])


@by_kind
@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.0])
def test_it_is_the_trainers_step(kind: type[FlowNoise], level: float) -> None:
    scheduler = flow_scheduler(T)
    rule = scheduler_rule(scheduler, None, kind(level))
    terms = rule.step(torch.tensor([level], dtype=torch.float64))
    for k, (t, r) in enumerate(times(scheduler)):
        a, b, tau = published(kind, scheduler)(t, r, level)
        assert terms.x_scale.expand(T, 1, 1)[k].item() == pytest.approx(a, abs=1e-14)
        assert terms.output_scale.expand(T, 1, 1)[k].item() == pytest.approx(b, abs=1e-14)
        assert terms.std[k].item() == pytest.approx(tau, abs=1e-14)
    assert rule.timesteps.equal(scheduler.timesteps)


def test_what_stands_for_t_at_its_start_is_the_next_sigma_or_given() -> None:
    [sigma, after] = times(flow_scheduler(T))[0]
    assert sigma == 1.0
    for sigma_max, used in ((None, after), (0.99, 0.99)):
        built = table(mf.FlowSDE, [0.7], weights=[1.0], settings={"sigma_max": sigma_max})
        a, [b], tau = columns(built, 0)
        assert (a, b, tau) == pytest.approx(flow_grpo(sigma, after, 0.7, used), abs=1e-14)


@by_kind
def test_unequal_levels_are_eq_7_of_the_published_gaussians(kind: type[FlowNoise]) -> None:
    scheduler = flow_scheduler(T)
    built = table(kind, fusion="posterior")
    noisy_last = kind in SDES
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    for k, (t, r) in enumerate(times(scheduler)[: T if noisy_last else -1]):
        steps = [published(kind, scheduler)(t, r, level) for level in LEVELS]
        a, b, tau = columns(built, k)
        variances = torch.tensor([std**2 for _, _, std in steps], dtype=torch.float64)
        for x, *v in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]):
            means = [on_x * x + on_v * each for (on_x, on_v, _), each in zip(steps, v, strict=True)]
            mean, var = fuse_posteriors(
                torch.tensor([means], dtype=torch.float64).T, variances, weights
            )
            found = a * x + sum(scale * each for scale, each in zip(b, v, strict=True))
            assert found == pytest.approx(mean.item(), abs=1e-14)
            assert tau**2 == pytest.approx(var.item(), abs=1e-14)
    assert bool(built.std[-1] > 0) == noisy_last
    # the limit of the ratios weighs the objectives where no noise is left
    torch.testing.assert_close(built.share[-1], built.share[0], rtol=1e-12, atol=0)


@by_kind
def test_equal_levels_are_one_step_on_the_mean(kind: type[FlowNoise]) -> None:
    """Identity 1 (the schedulers with a history: tests/pipelines/test_fused_scheduler.py)."""
    built, alone = table(kind, (0.6, 0.6)), table(kind, [0.6], weights=[1.0])
    for k in range(T):
        (a, b, tau), (a_1, [b_1], tau_1) = columns(built, k), columns(alone, k)
        assert (a, tau) == pytest.approx((a_1, tau_1), abs=1e-15)
        assert b == pytest.approx([w * b_1 for w in WEIGHTS], abs=1e-15)


@by_sde
def test_unequal_sdes_are_one_sde_at_the_fused_level(kind: type[FlowNoise]) -> None:
    """Identity 2: A and B are affine in tau^2, so Eq. 7 is the step at P^(-1/2) on mixed v."""
    precision = sum(w / a**2 for w, a in zip(WEIGHTS, LEVELS, strict=True))
    fused, mixed = table(kind), table(kind, fusion="eps")
    alone = table(kind, [precision**-0.5], weights=[1.0])
    for k in range(T):
        (a, b, tau), (a_1, [b_1], tau_1) = columns(fused, k), columns(alone, k)
        assert a == pytest.approx(a_1, abs=4e-16)
        assert sum(b) == pytest.approx(b_1, abs=4e-16) and tau == pytest.approx(tau_1, abs=4e-16)
        assert columns(mixed, k)[1] == pytest.approx(b, abs=1e-15)
        if kind is mf.FlowSDE and k > 0:
            pairs = zip(WEIGHTS, LEVELS, strict=True)
            what = [w * (2 / level**2 + 1) / (2 * precision + 1) for w, level in pairs]
            assert [part / b_1 for part in b] == pytest.approx(what, abs=1e-14)


def test_flow_grpo_s_level_is_ddim_s_times_sqrt_2() -> None:
    """Identity 3: A, B and tau^2 differ by O(1 / T) of the step's length."""

    def gaps(many: int) -> torch.Tensor:
        sde = table(mf.FlowSDE, [0.7], many, [1.0])
        ddim = table(mf.FlowDDIM, [0.7 / math.sqrt(2)], many, [1.0])
        lengths = -flow_scheduler(many).sigmas.diff()
        found = []
        for k in (many // 10, many // 2, 9 * many // 10):
            (a, [b], tau), (a_1, [b_1], tau_1) = columns(sde, k), columns(ddim, k)
            gap = torch.tensor([a - a_1, b - b_1, tau**2 - tau_1**2], dtype=torch.float64)
            found.append(gap.abs() / lengths[k])
        return torch.stack(found)

    few, many = gaps(400), gaps(4000)
    assert (many < few / 8).all() and many.max() < 0.1


def noise_left(built: CoefficientTable, k: int) -> float:
    """What a step leaves of a model fused with itself, over what sigma_next says."""
    t, r = times(flow_scheduler(len(built)))[k]
    a, b, tau = columns(built, k)
    return math.hypot(a * t + sum(b), tau) / r


def test_unequal_cps_loses_noise_at_any_step_size_unless_predictions_are_mixed() -> None:
    """Identity 4."""
    for num_steps in (10, 100, 1000):
        k = num_steps // 2
        fused = table(mf.CPS, num_steps=num_steps, fusion="posterior")
        assert noise_left(fused, k) == pytest.approx(0.975, abs=1e-3)
        assert noise_left(table(mf.CPS, num_steps=num_steps), k) == pytest.approx(1, abs=1e-14)
    for kind in (mf.FlowSDE, mf.FlowDDIM):
        few, many = (1 - noise_left(table(kind, num_steps=n), n // 2) for n in (100, 1000))
        assert abs(many) < abs(few) / 50  # per step O(1 / T^2), O(1 / T) in all
    assert table(mf.CPS).rows.equal(table(mf.CPS, fusion="eps").rows)
    assert table(mf.FlowDDIM).rows.equal(table(mf.FlowDDIM, fusion="posterior").rows)


@by_kind
def test_without_noise_it_is_the_ode_on_the_mean(kind: type[FlowNoise]) -> None:
    """Identity 5."""
    built = table(kind, (0.0, 0.0))
    for k, (t, r) in enumerate(times(flow_scheduler(T))):
        a, b, tau = columns(built, k)
        assert (a, tau) == pytest.approx((1.0, 0.0), abs=1e-15)
        assert b == pytest.approx([w * (r - t) for w in WEIGHTS], abs=1e-15)


@by_kind
@pytest.mark.parametrize("fusion", ["posterior", "eps"])
def test_theorem_1_on_gaussian_data(kind: type[FlowNoise], fusion: str) -> None:
    """The moments of x_0 from `denoise`, against Eq. 7 of the experts' chains, in float64."""
    experts, scheduler = (Gaussian(1.0, 0.25), Gaussian(-1.0, 0.5)), flow_scheduler(T)
    step = published(kind, scheduler)
    chains = [
        chain(expert, scheduler, partial(lambda level, t, r: step(t, r, level), level))
        for expert, level in zip(experts, LEVELS, strict=True)
    ]
    if kind not in SDES:  # no noise is left at r = 0: the same shares as before
        *head, last = zip(*chains, strict=True)
        rates = [math.sin(a * math.pi / 2) if kind is mf.CPS else a for a in LEVELS]
        scales = [each._replace(var=c**2) for each, c in zip(last, rates, strict=True)]
        expected_chain = fuse_chains(list(zip(*head, strict=True)), WEIGHTS)
        expected_chain += [fuse_chains([[each] for each in scales], WEIGHTS)[0]._replace(var=0.0)]
    else:
        expected_chain = fuse_chains(chains, WEIGHTS)

    def found(fusion: str) -> Moments:
        def network(expert: Gaussian):
            def v(x, t):
                slope, offset = velocity(expert, float(t) / 1000)
                return slope * x + offset

            return v

        return measured_moments(
            lambda x_T, z: mf.denoise(
                [network(expert) for expert in experts],
                x_T,
                scheduler=scheduler,
                num_steps=None,
                weights=WEIGHTS,
                levels=[kind(level) for level in LEVELS],
                noise=z,
                fusion=fusion,
            ),
            T,
        )

    if fusion == "posterior" or kind in SDES:  # for SDEs the two are the same
        assert found(fusion) == pytest.approx(moments(expected_chain), abs=1e-12)
    else:
        assert abs(found(fusion).var - moments(expected_chain).var) > 1e-3


@by_kind
def test_outside_of_a_window_it_is_the_ode(kind: type[FlowNoise]) -> None:
    plain, ode = table(kind), table(kind, (0.0, 0.0))
    windowed = table(kind, settings={"window": (2, 5)})
    for k in range(T):
        expected = plain if 2 <= k < 5 else ode
        torch.testing.assert_close(windowed.rows[k], expected.rows[k], rtol=0, atol=1e-15)
        torch.testing.assert_close(windowed.share[k], expected.share[k])
    quiet = table(kind, settings={"last_step": False})
    assert quiet.rows[:-1].equal(plain.rows[:-1])
    torch.testing.assert_close(quiet.rows[-1], ode.rows[-1], rtol=0, atol=1e-15)


@by_kind
def test_zero_variance_follows_the_policy(kind: type[FlowNoise]) -> None:
    with pytest.raises(ZeroVariance):
        table(kind, (0.0, 0.4))
    dominated = table(kind, (0.0, 0.4), zero_variance="dominate")
    assert dominated.share[:, 0].equal(torch.tensor([[1.0, 0.0]] * T).double())
    rated = table(kind, (0.0, 0.0), zero_variance="ratio", rates=[1.0, 2.0])
    assert rated.share[0, 0].tolist() == pytest.approx([0.3 / 0.475, 0.175 / 0.475])


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "level"),
        [(mf.FlowSDE, -0.1), (mf.CPS, 1.1), (mf.FlowDDIM, 1.5), (mf.DanceSDE, math.nan)],
    )
    def test_a_level_outside_its_range(self, kind, level) -> None:
        with pytest.raises(InvalidSchedule, match=rf"{kind.__name__}: \w+ must lie in .*{level}"):
            kind(level)

    @pytest.mark.parametrize("window", [(3, 3), (-1, 2), (1, 2, 3), [0, 2], (0.0, 2.0), 4])
    def test_a_window_that_is_none(self, window) -> None:
        with pytest.raises(InvalidSchedule, match="window must be None or"):
            mf.FlowSDE(0.7, window=window)

    def test_a_window_beyond_the_steps(self) -> None:
        with pytest.raises(InvalidSchedule, match=r"window \(4, 11\) ends after .* 10 steps"):
            table(mf.CPS, settings={"window": (4, 11)})

    @pytest.mark.parametrize("sigma_max", [0.0, 1.0, math.nan])
    def test_a_ceiling_that_is_none(self, sigma_max) -> None:
        with pytest.raises(InvalidSchedule, match="sigma_max"):
            mf.FlowSDE(0.7, sigma_max=sigma_max)

    @pytest.mark.parametrize(
        "other",
        [mf.CPS(0.7), 0.7, mf.FlowSDE(0.7, last_step=False), mf.FlowSDE(0.7, window=(0, 2))],
    )
    def test_objectives_of_different_kinds(self, other) -> None:
        with pytest.raises(InvalidSchedule, match=r"objective 1 has the level .* of one kind"):
            read_levels([mf.FlowSDE(0.7), other])

    @pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler", "FlowMatchLCMScheduler"])
    def test_noise_of_flow_models_for_another_scheduler(self, name: str) -> None:
        import diffusers

        scheduler = getattr(diffusers, name)()
        with pytest.raises(InvalidSchedule, match=rf"FlowSDE is noise of flow models.*{name}"):
            mf.coefficient_table(scheduler, 5, levels=[mf.FlowSDE(0.7)], weights=None)

    def test_a_scheduler_that_renoises_by_itself(self) -> None:
        scheduler = flow_scheduler(T)
        scheduler.register_to_config(stochastic_sampling=True)
        with pytest.raises(InvalidSchedule, match="stochastic_sampling=False"):
            mf.coefficient_table(scheduler, None, levels=[mf.CPS(0.7)], weights=None)

    @pytest.mark.parametrize("sigmas", [[80.0, 1.0, 0.0], [0.5, 0.7, 0.0], [0.5, math.nan, 0.0]])
    def test_sigmas_that_are_no_flow_s(self, sigmas) -> None:
        scheduler = flow_scheduler(2)
        scheduler.sigmas = torch.tensor(sigmas)
        with pytest.raises(InvalidSchedule, match=r"decrease within \[0, 1\]"):
            mf.coefficient_table(scheduler, None, levels=[mf.CPS(0.7)], weights=None)

    def test_timesteps_that_are_not_set_or_need_mu(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        with pytest.raises(InvalidSchedule, match="set_timesteps first"):
            mf.coefficient_table(dynamic, None, levels=[mf.CPS(0.7)], weights=None)
        with pytest.raises(InvalidSchedule, match=r"mu.* num_steps=None"):
            mf.coefficient_table(dynamic, 5, levels=[mf.CPS(0.7)], weights=None)
        dynamic.set_timesteps(5, mu=0.8)
        built = mf.coefficient_table(dynamic, None, levels=[mf.CPS(0.7)], weights=None)
        assert built.timesteps.equal(dynamic.timesteps)

    def test_extrapolating_beyond_the_highest_level(self) -> None:
        with pytest.raises(InvalidWeights, match="a_w, whose rate is"):
            table(mf.CPS, (0.99, 0.4), weights=[1.01, -0.01], extrapolate=True, fusion="eps")

# SPDX-License-Identifier: Apache-2.0
"""TFG: guidance of x_t and of x0hat, and the methods it contains."""

import math
from dataclasses import replace

import pytest
import torch

from msdda_fast.methods.model import BASE
from msdda_fast.methods.tfg import PRESETS, TFG
from tests.gaussian_world import ddim_chain, moments, sd15_scheduler
from tests.methods.gaussian_model import exact_moments, sampled
from tests.methods.guided_world import DATA, guided_steps, linear, plain, quadratic, shift, world

SCHEDULES = ["increase", "decrease", "constant"]
KAPPA, C = 0.3, 2.0  # of the quadratic reward, where one is used


def ratio(a: float, p: float, schedule: str) -> float:
    return {"increase": a / p, "decrease": 1 - a / p, "constant": 1.0}[schedule]


def strengths(schedule: str, eta: float = 1.0) -> list[float]:
    """q T / sum q over the steps that are taken."""
    q = [ratio(step.a, step.p, schedule) for step in guided_steps(eta)]
    return [value * len(q) / sum(q) for value in q]


def on_x_t(schedule: str = "increase", eta: float = 1.0) -> float:
    """Shift of x_0 by Delta_t for f = x_0: grad_{x_t} f is the Jacobian."""
    return sum(
        s.gain * rho * s.jacobian / math.sqrt(s.a / s.p)
        for s, rho in zip(guided_steps(eta), strengths(schedule, eta), strict=True)
    )


def on_x0hat(schedule: str = "increase", eta: float = 1.0) -> float:
    """Shift of x_0 by one move of x0hat for f = x_0: grad_{x_0} f is 1."""
    return sum(
        s.gain * math.sqrt(s.p) * mu
        for s, mu in zip(guided_steps(eta), strengths(schedule, eta), strict=True)
    )


@pytest.mark.parametrize("eta", [1.0, 0.8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_closed_form_of_a_linear_reward_has_two_parts(schedule, eta):
    parts = {
        "x_t": (TFG(rho=0.7, mu=0.0, rho_schedule=schedule, eta=eta), 0.7 * on_x_t(schedule, eta)),
        "x0hat": (
            TFG(rho=0.0, mu=0.4, mu_schedule=schedule, eta=eta),
            0.4 * on_x0hat(schedule, eta),
        ),
    }
    found = {name: shift(method, linear(0.1)) for name, (method, _) in parts.items()}
    for name, (_, expected) in parts.items():
        assert found[name] == pytest.approx(0.1 * expected, rel=1e-10)
    both = TFG(rho=0.7, mu=0.4, rho_schedule=schedule, mu_schedule=schedule, eta=eta)
    assert shift(both, linear(0.1)) == pytest.approx(sum(found.values()), rel=1e-10)


@pytest.mark.parametrize(
    "settings",
    [{}, {"n_samples": 1, "sigma": 0.0}, {"n_samples": 7, "sigma": 2.0}],
    ids=str,
)
def test_a_linear_reward_knows_neither_samples_nor_smoothing(settings):
    """And only the mean moves."""
    method = TFG(alpha=2.0, **settings)
    found = exact_moments(
        method, {BASE: DATA}, preference={"r": 1.0}, scalar_rewards={"r": linear(0.1)}
    )
    base = moments(ddim_chain(DATA, 1.0, sd15_scheduler()))
    assert found.mean - base.mean == pytest.approx(0.05 * (on_x_t() + on_x0hat()), rel=1e-10)
    assert found.var == pytest.approx(base.var, rel=1e-10)


def test_preferences_weigh_inside_the_target():
    found = shift(TFG(), linear(0.3), linear(-0.1), weights=[0.2, 0.8])
    assert found == pytest.approx((0.2 * 0.3 - 0.8 * 0.1) * (on_x_t() + on_x0hat()), rel=1e-10)


def test_x0hat_moves_n_iter_times_from_where_it_is():
    """For f = -kappa/2 (x - c)^2 each move closes the share mu_t kappa of the way to c."""
    method = TFG(rho=0.0, mu=0.5, n_iter=3, sigma=0.0, mu_schedule="decrease")
    x, model = torch.tensor([[0.3]], dtype=torch.float64), world(quadratic(KAPPA, C))
    model.x_T = x
    mus = [0.5 * mu for mu in strengths("decrease")]
    for k, (step, mu) in enumerate(zip(guided_steps(), mus, strict=True)):
        eps = model.eps(x, k)
        x0hat = (x - math.sqrt(1 - step.a) * eps) / math.sqrt(step.a)
        way = (C - x0hat) * (1 - (1 - mu * KAPPA) ** 3)
        x = (
            math.sqrt(step.p / step.a) * x
            + step.on_eps * eps
            + math.sqrt(step.var) * model.noise(k)
        )
        x = x + math.sqrt(step.p) * way
    torch.testing.assert_close(sampled(method, model), x[:, 0], rtol=1e-10, atol=0)


def test_likely_wrong_ports_land_elsewhere():
    steps = guided_steps()
    right_t, right_0 = on_x_t(), on_x0hat()
    assert shift(TFG(), linear(1.0)) == pytest.approx(right_t + right_0, rel=1e-10)
    bars = sd15_scheduler().alphas_cumprod.tolist()
    every = [1.0, *bars]
    rho = strengths("increase")
    wrong_t = {
        "Delta_t as it is": sum(s.gain * r * s.jacobian for s, r in zip(steps, rho, strict=True)),
        "network held constant": sum(
            s.gain * r / math.sqrt(s.p) for s, r in zip(steps, rho, strict=True)
        ),
    }
    wrong_0 = {
        "Delta_0 as it is": sum(s.gain * r for s, r in zip(steps, rho, strict=True)),
        "DDIM from the moved x0hat": sum(
            # eps' = (x - sqrt(a) x0') / sqrt(1 - a) turns against the move
            s.gain * r * -s.on_eps * math.sqrt(s.a / (1 - s.a))
            for s, r in zip(steps, rho, strict=True)
        ),
    }
    for port, value in wrong_t.items():
        assert abs(value / right_t - 1) > 0.01, port
    for port, value in wrong_0.items():
        assert abs(value / right_0 - 1) > 0.02, port
    for schedule in ("increase", "decrease"):
        over_all = sum(ratio(a, p, schedule) for a, p in zip(bars, every, strict=False)) / 1000
        over_run = sum(ratio(s.a, s.p, schedule) for s in steps) / 50
        assert abs(over_run / over_all - 1) > 0.02, f"{schedule} normalised over all 1000 steps"


@pytest.mark.parametrize("n_recur", [1, 2, 3])
def test_recurrence_does_the_step_again_from_noise(n_recur):
    """Between passes a shift shrinks by sqrt(a/p); after the last it stays."""
    expected, with_last = 0.0, 0.0
    for step, q in zip(guided_steps(), strengths("increase"), strict=True):
        kept = math.sqrt(step.a / step.p)
        own = q * (step.jacobian / kept + math.sqrt(step.p))
        for left in reversed(range(n_recur)):
            expected = step.on_x * expected + own
            with_last = kept * (step.on_x * with_last + own)
            if left:
                expected *= kept
    assert shift(TFG(n_recur=n_recur), linear(0.1)) == pytest.approx(0.1 * expected, rel=1e-10)
    assert abs(with_last / expected - 1) > 0.02  # the last pass is not noised


def test_passes_have_noise_of_their_own():
    """Without guidance two passes are one step of another walk with the same law."""
    two = sampled(TFG(rho=0.0, mu=0.0, n_recur=2), world(linear(0.0), batch_size=20_000))
    exact = moments(ddim_chain(DATA, 1.0, sd15_scheduler()))
    assert float(two.mean()) == pytest.approx(exact.mean, abs=0.015)
    assert float(two.var()) == pytest.approx(exact.var, abs=0.02)


def walk(model, step_of, *, schedule, n_recur=1):
    """x_0 by a sampler of its own: `step_of(k, left, x0hat, jacobian)` gives both Deltas."""
    x = model.initial()
    for k, (step, q) in enumerate(zip(guided_steps(), strengths(schedule), strict=True)):
        for left in reversed(range(n_recur)):
            eps = model.eps(x, k)
            x0hat = (x - math.sqrt(1 - step.a) * eps) / math.sqrt(step.a)
            on_x, on_0 = step_of(k, left, step, x0hat)
            z = model.noise(k, purpose=3 * left)
            mean = math.sqrt(step.p) * x0hat + math.sqrt(1 - step.p - step.var) * eps
            kept = step.a / step.p
            prev = mean + math.sqrt(step.var) * z + q * on_x / math.sqrt(kept)
            prev = prev + q * math.sqrt(step.p) * on_0
            if left:
                again = model.noise(k, purpose=3 * left + 2)
                x = math.sqrt(kept) * prev + math.sqrt(1 - kept) * again
        x = prev
    return x[:, 0]


def slope(x):
    """Of the quadratic reward."""
    return KAPPA * (C - x)


def smoothed_slope(samples, *, wrong=None):
    """Of log mean exp of the reward over samples (K, B, 1), by all of them alike."""
    rewards = -KAPPA / 2 * (samples - C) ** 2
    share = torch.full_like(rewards, 1 / len(rewards)) if wrong == "mean" else rewards.softmax(0)
    total = (share * slope(samples)).sum(0)
    return total / len(rewards) if wrong == "1/n" else total


def bed():
    return world(quadratic(KAPPA, C), batch_size=5)


def test_dps_is_one_gradient_through_the_network():
    expected = walk(
        bed(), lambda k, left, s, x0hat: (s.jacobian * slope(x0hat), 0.0), schedule="constant"
    )
    found = sampled(PRESETS["dps"], bed())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("wrong", [None, "mean", "1/n"])
def test_lgd_smooths_with_std_sqrt_1_minus_a_by_log_mean_exp(wrong):
    """The mean loss, and the surplus 1/n of one public code, are told apart."""
    model = bed()

    def deltas(k, left, s, x0hat):
        xi = model.noise(k, 10, purpose=3 * left + 1).view(10, 5, 1)
        samples = x0hat + math.sqrt(1 - s.a) * xi
        return s.jacobian * smoothed_slope(samples, wrong=wrong), 0.0

    expected = walk(model, deltas, schedule="constant")
    error = (sampled(PRESETS["lgd"], bed()) - expected).abs().max()
    assert error < 1e-10 if wrong is None else error > 0.01


def test_mpgd_moves_x0hat_and_runs_no_network_backwards():
    model = bed()
    found = sampled(PRESETS["mpgd"], model)
    expected = walk(bed(), lambda k, left, s, x0hat: (0.0, slope(x0hat)), schedule="constant")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert model.cost.unet_backwards == 0
    assert model.cost.decodes == 5 * (50 + 1)


def test_freedom_is_dps_with_time_travel():
    expected = walk(
        bed(),
        lambda k, left, s, x0hat: (s.jacobian * slope(x0hat), 0.0),
        schedule="increase",
        n_recur=2,
    )
    torch.testing.assert_close(sampled(PRESETS["freedom"], bed()), expected, rtol=1e-10, atol=0)


def test_ugd_guides_forward_and_backward():
    ugd = replace(PRESETS["ugd"], n_iter=1)
    expected = walk(
        bed(),
        lambda k, left, s, x0hat: (s.jacobian * slope(x0hat), slope(x0hat)),
        schedule="increase",
        n_recur=2,
    )
    torch.testing.assert_close(sampled(ugd, bed()), expected, rtol=1e-10, atol=0)


def test_x_t_and_x0hat_see_the_same_smoothing():
    model, method = bed(), TFG(sigma=0.5, n_samples=3)

    def deltas(k, left, s, x0hat):
        xi = model.noise(k, 3, purpose=3 * left + 1).view(3, 5, 1)
        smoothed = smoothed_slope(x0hat + 0.5 * math.sqrt(1 - s.a) * xi)
        return s.jacobian * smoothed, smoothed

    expected = walk(model, deltas, schedule="increase")
    torch.testing.assert_close(sampled(method, bed()), expected, rtol=1e-10, atol=0)


def test_methods_differ_by_what_they_leave_out():
    dps = PRESETS["dps"]
    assert replace(PRESETS["lgd"], sigma=0.0, n_samples=1) == dps
    assert replace(PRESETS["freedom"], n_recur=1, rho_schedule="constant") == dps
    assert replace(PRESETS["ugd"], mu=0.0, n_iter=1) == PRESETS["freedom"]
    assert replace(dps, rho=0.0, mu=1.0, mu_schedule="constant") == replace(
        PRESETS["mpgd"], rho_schedule="constant"
    )


def test_no_guidance_is_the_base():
    found = sampled(TFG(rho=0.0, mu=0.0), world(quadratic(1.0, 3.0), batch_size=3))
    assert torch.equal(found, plain(world(linear(0.0), batch_size=3))[:, 0])


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_cost(rho):
    method = TFG(rho=rho, n_samples=3, n_iter=2, n_recur=2)
    model = world(linear(0.1), linear(0.2), batch_size=4)
    sampled(method, model)
    images, steps, rewards, recur, samples, iters = 4, 50, 2, 2, 3, 2
    scored = recur * steps * samples * ((rho != 0) + iters)
    assert model.cost.unet_forwards == images * recur * steps
    assert model.cost.unet_backwards == images * recur * steps * (rho != 0)
    assert model.cost.decodes == images * (scored + 1)
    assert model.cost.reward_calls == images * rewards * scored


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -1.0}, "rho must be 0 or more"),
        ({"sigma": -0.1}, "sigma must be 0 or more"),
        ({"n_samples": 0}, "n_samples must be 1 or more"),
        ({"mu_schedule": "linear"}, "mu_schedule must be one of .*'linear'"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"eta": 2.0}, "eta must lie in"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TFG(**settings)

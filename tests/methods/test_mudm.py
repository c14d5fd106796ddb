# SPDX-License-Identifier: Apache-2.0
"""MUDM: log-mean-exp over samples of x_0, property by property or all together."""

import math

import pytest
import torch
from torch import Tensor

from msdda_fast.methods.model import BASE
from msdda_fast.methods.mudm import MUDM
from tests.gaussian_world import ddim_chain, moments, sd15_scheduler
from tests.methods.gaussian_model import GaussianModel, exact_moments, sampled
from tests.methods.guided_world import DATA, guided_steps, linear, plain, quadratic, shift, world


def per_slope(eta: float = 1.0, num_steps: int = 50) -> float:
    """Shift of x_0 by the reward x_0: eps falls by sqrt(1 - a) J in every step."""
    return sum(
        s.gain * -s.on_eps * math.sqrt(1 - s.a) * s.jacobian for s in guided_steps(eta, num_steps)
    )


@pytest.mark.sweep(1)
@pytest.mark.parametrize("eta", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("dependency", ["independent", "dependent"])
@pytest.mark.parametrize(
    "settings", [{}, {"n_samples": 1}, {"n_samples": 9, "spread": 0.3}, {"spread": 0.0}], ids=str
)
def test_a_linear_loss_knows_neither_samples_nor_dependency(settings, dependency, eta):
    """log (1/n) sum exp(b x0hat + b r xi_n) = b x0hat + a constant: the gradient is J b."""
    method = MUDM(scale=1.5, alpha=2.0, dependency=dependency, eta=eta, **settings)
    found = exact_moments(
        method,
        {BASE: DATA},
        preference={"up": 0.75, "down": 0.25},
        scalar_rewards={"up": linear(0.3), "down": linear(-0.1)},
    )
    base = moments(ddim_chain(DATA, eta, sd15_scheduler()))
    slope = 1.5 * (0.75 * 0.3 - 0.25 * 0.1) / 2.0
    assert found.mean - base.mean == pytest.approx(slope * per_slope(eta), rel=1e-9)
    assert found.var == pytest.approx(base.var, rel=1e-9)


def test_likely_wrong_ports_of_the_step_land_elsewhere():
    steps, right = guided_steps(), per_slope()
    assert shift(MUDM(n_samples=3), linear(0.1)) == pytest.approx(0.1 * right, rel=1e-9)
    wrong = {
        "divided by n once more": right / 3,
        "network held constant": sum(
            s.gain * -s.on_eps * math.sqrt((1 - s.a) / s.a) for s in steps
        ),
        "gradient added to eps": -right,
        "no sqrt(1 - a)": sum(s.gain * -s.on_eps * s.jacobian for s in steps),
        "reward of the noisy latents": sum(s.gain * -s.on_eps * math.sqrt(1 - s.a) for s in steps),
    }
    for port, value in wrong.items():
        assert abs(value / right - 1) > 0.02, port


@pytest.mark.parametrize("eta", [1.0, 0.8, 0.0])
def test_strength_1_reaches_the_tilted_data(eta):
    """p(x_0) exp(b x_0) has its mean at m + b s2; T steps from an x_T not tilted come near."""
    found = shift(MUDM(n_samples=1, eta=eta), linear(1.0))
    assert found == pytest.approx(DATA.var, rel=0.05)


class Quantiles(GaussianModel):
    """The samples of x_0 are evenly spaced in probability, so that n may pass for infinite."""

    def noise(self, k: int, particles: int = 1, *, purpose: int = 0) -> Tensor:
        if particles == 1:
            return super().noise(k, purpose=purpose)
        chances = (torch.arange(particles, dtype=torch.float64) + 0.5) / particles
        return torch.special.ndtri(chances).repeat_interleave(self.batch_size)[:, None]


def quadratic_world(*kappas_and_centres, weights) -> Quantiles:
    model = world(*[quadratic(*pair) for pair in kappas_and_centres], weights=weights, num_steps=10)
    return Quantiles(**{f: getattr(model, f) for f in model.__dataclass_fields__})


def quadratic_walk(model, pull_of, *, variance=1.0) -> Tensor:
    """x_0 with grad ell = J sum w kappa' (c - x0hat), `kappa' = pull_of(kappa, r^2)`."""
    x = model.initial()
    for k, step in enumerate(guided_steps(num_steps=model.num_steps)):
        eps = model.eps(x, k)
        x0hat = (x - math.sqrt(1 - step.a) * eps) / math.sqrt(step.a)
        gradient = step.jacobian * pull_of(x0hat, variance * (1 - step.a))
        eps = eps - math.sqrt(1 - step.a) * gradient
        x = (
            math.sqrt(step.p / step.a) * x
            + step.on_eps * eps
            + math.sqrt(step.var) * model.noise(k)
        )
    return x[:, 0]


def pull(kappa: float, c: float):
    """Slope of log E exp(-kappa/2 (x - c)^2) over x ~ N(x0hat, r2): -(x0hat - c)/(1/kappa + r2)."""
    return lambda x0hat, r2: (c - x0hat) / (1 / kappa + r2)


def test_one_quadratic_loss_with_endless_samples():
    def found(spread):
        model = quadratic_world((1.0, 2.0), weights=[1.0])
        return float(sampled(MUDM(n_samples=40_001, spread=spread), model))

    def expected(pull_of, variance):
        model = quadratic_world((1.0, 2.0), weights=[1.0])
        return float(quadratic_walk(model, pull_of, variance=variance))

    right = expected(pull(1.0, 2.0), 1.0)
    assert found(1.0) == pytest.approx(right, abs=2e-4)
    assert found(0.5) == pytest.approx(expected(pull(1.0, 2.0), 0.25), abs=2e-4)
    # the mean of the loss has the slope of the loss itself, whatever the spread
    mean_of_losses = expected(lambda x0hat, r2: 1.0 * (2.0 - x0hat), 1.0)
    assert abs(mean_of_losses - right) > 0.01


PAIR, WEIGHTS = ((6.0, 2.0), (3.0, -1.0)), [0.4, 0.6]


def pulls(dependency: str, x0hat: Tensor, r2: float) -> Tensor:
    (k1, c1), (k2, c2) = PAIR
    w1, w2 = WEIGHTS
    if dependency == "independent":
        return w1 * pull(k1, c1)(x0hat, r2) + w2 * pull(k2, c2)(x0hat, r2)
    if dependency == "other samples for each property":  # their expectations multiply
        return pull(w1 * k1, c1)(x0hat, r2) + pull(w2 * k2, c2)(x0hat, r2)
    joint = w1 * k1 + w2 * k2  # the product of the two is one quadratic
    return pull(joint, (w1 * k1 * c1 + w2 * k2 * c2) / joint)(x0hat, r2)


def test_two_quadratic_losses_apart_and_together():
    def walked(dependency):
        model = quadratic_world(*PAIR, weights=WEIGHTS)
        return float(quadratic_walk(model, lambda x0hat, r2: pulls(dependency, x0hat, r2)))

    for dependency in ("independent", "dependent"):
        method = MUDM(n_samples=40_001, dependency=dependency)
        found = float(sampled(method, quadratic_world(*PAIR, weights=WEIGHTS)))
        assert found == pytest.approx(walked(dependency), abs=2e-4)
    kinds = [walked(d) for d in ("independent", "dependent", "other samples for each property")]
    for index, one in enumerate(kinds):
        assert all(abs(one - other) > 0.01 for other in kinds[index + 1 :])


def chained(rewards: list[Tensor], weights: list[float]) -> Tensor:
    """ell_1 + ell_{2|1} + ..., (B,), of rewards (n, B), whose samples each property reweighs."""
    share = torch.full_like(rewards[0], 1 / len(rewards[0]))
    ell = torch.zeros(rewards[0].shape[1], dtype=torch.float64)
    for reward, weight in zip(rewards, weights, strict=True):
        likelihood = (weight * reward).exp()
        ell = ell + (share * likelihood).sum(0).log()
        share = share * likelihood / (share * likelihood).sum(0)
    return ell


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=str)
def test_the_chain_of_conditionals_is_the_same_in_any_order(order):
    """Term by term, in a sampler of its own, with few samples."""
    rewards = [quadratic(1.5, 2.0), quadratic(0.8, -1.0), lambda x: (3 * x).sin()]
    weights, n, batch = [0.5, 0.2, 0.3], 3, 4
    model = world(*rewards, weights=weights, batch_size=batch, num_steps=10)
    x = model.initial()
    for k, step in enumerate(guided_steps(num_steps=10)):
        x = x.detach().requires_grad_()
        eps = model.eps(x, k)
        x0hat = (x - math.sqrt(1 - step.a) * eps) / math.sqrt(step.a)
        xi = model.noise(k, n, purpose=1).view(n, batch)
        samples = x0hat[:, 0] + math.sqrt(1 - step.a) * xi
        ell = chained([rewards[i](samples) for i in order], [weights[i] for i in order])
        (gradient,) = torch.autograd.grad(ell.sum(), x)
        eps = (eps - math.sqrt(1 - step.a) * gradient).detach()
        z = model.noise(k)
        x = math.sqrt(step.p / step.a) * x.detach() + step.on_eps * eps + math.sqrt(step.var) * z
    fresh = world(*rewards, weights=weights, batch_size=batch, num_steps=10)
    found = sampled(MUDM(dependency="dependent", n_samples=n), fresh)
    torch.testing.assert_close(found, x[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dependency", ["independent", "dependent"])
def test_a_property_named_twice_is_one_property(dependency):
    """All properties see the same samples: two of half a preference are one of all of it."""
    method, reward = MUDM(n_samples=2, dependency=dependency), quadratic(1.0, 2.0)
    one = sampled(method, world(reward, batch_size=3))
    two = sampled(method, world(reward, reward, weights=[0.5, 0.5], batch_size=3))
    torch.testing.assert_close(two, one, rtol=1e-12, atol=0)


def test_only_the_interval_is_guided():
    found = shift(MUDM(interval=(0.2, 0.6)), linear(0.1))
    expected = sum(
        s.gain * -s.on_eps * math.sqrt(1 - s.a) * s.jacobian for s in guided_steps()[10:30]
    )
    assert found == pytest.approx(0.1 * expected, rel=1e-9)
    model = world(linear(0.1))
    sampled(MUDM(interval=(0.2, 0.6), n_samples=2, n_recur=3), model)
    assert model.cost.unet_forwards == 30 + 20 * 3
    assert model.cost.unet_backwards == 20 * 3
    assert model.cost.decodes == 20 * 3 * 2 + 1


@pytest.mark.parametrize("n_recur", [2, 3])
def test_recurrence_does_the_step_again_from_noise(n_recur):
    expected = 0.0
    for step in guided_steps():
        own = -step.on_eps * math.sqrt(1 - step.a) * step.jacobian
        for left in reversed(range(n_recur)):
            expected = step.on_x * expected + own
            if left:
                expected *= math.sqrt(step.a / step.p)
    assert shift(MUDM(n_recur=n_recur), linear(0.1)) == pytest.approx(0.1 * expected, rel=1e-9)


@pytest.mark.parametrize("zero", [{"scale": 0.0}, {"interval": (0.5, 0.5)}], ids=str)
def test_no_guidance_is_the_base(zero):
    found = sampled(MUDM(**zero), world(quadratic(1.0, 3.0), batch_size=3))
    assert torch.equal(found, plain(world(linear(0.0), batch_size=3))[:, 0])


@pytest.mark.parametrize("dependency", ["independent", "dependent"])
def test_cost(dependency):
    method = MUDM(n_samples=3, n_recur=2, dependency=dependency)
    model = world(linear(0.1), linear(0.2), batch_size=4)
    sampled(method, model)
    images, steps, rewards, recur, samples = 4, 50, 2, 2, 3
    assert model.cost.unet_forwards == images * recur * steps
    assert model.cost.unet_backwards == images * recur * steps
    assert model.cost.decodes == images * (recur * steps * samples + 1)
    assert model.cost.reward_calls == images * rewards * recur * steps * samples


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, "scale must be 0 or more"),
        ({"spread": -1.0}, "spread must be 0 or more"),
        ({"n_samples": 0}, "n_samples must be 1 or more"),
        ({"n_recur": 0}, "n_recur must be 1 or more"),
        ({"dependency": "chain"}, "dependency must be one of .*'chain'"),
        ({"interval": (0.6, 0.2)}, "interval must be .* 0 <= lo <= hi <= 1"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"eta": -0.1}, "eta must lie in"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MUDM(**settings)

# SPDX-License-Identifier: Apache-2.0
"""The step-level DPO loss: identities, Diffusion-DPO as gamma = 0, a zero-mean advantage."""

import math

import pytest
import torch
from torch.nn import functional

from msdda_fast.errors import InvalidShape
from msdda_fast.training.step_dpo import dpo_coefficient, snr_weight, step_dpo_loss, to_epsilon

from .conftest import make_scheduler

GAMMAS = pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])


def predictions(n=5, shape=(4, 3, 2), dtype=torch.float64, seed=0):
    """theta, pre and noise of the chosen, then of the rejected; the noise is shared."""
    generator = torch.Generator().manual_seed(seed)
    theta, pre, theta_rejected, pre_rejected, noise = torch.randn(
        5, n, *shape, generator=generator, dtype=dtype
    )
    return [theta, pre, noise, theta_rejected, pre_rejected, noise]


def implicit_reward(theta, pre, noise, gamma, c=1.0):
    """The chosen half of the logit: the rejected half is zero where it does not drift."""
    return step_dpo_loss(theta, pre, noise, pre, pre, noise, coefficient=c, gamma=gamma).logits


def test_d1_untrained_model_has_loss_log_2_and_one_gradient_for_all_gamma():
    gradients = []
    for gamma in (0.0, 1.0):
        theta, pre, noise, theta_rejected, pre_rejected, _ = predictions()
        theta, theta_rejected = pre.clone().requires_grad_(), pre_rejected.clone().requires_grad_()
        result = step_dpo_loss(
            theta, pre, noise, theta_rejected, pre_rejected, noise, coefficient=0.7, gamma=gamma
        )
        result.loss.backward()
        assert result.loss.item() == pytest.approx(math.log(2), rel=1e-15)
        assert result.drift_chosen.abs().max() == 0
        gradients.append((theta.grad, theta_rejected.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    # d softplus(-L)/dL = -1/2 at L = 0 and dL/d eps_theta = -2 c a for the chosen
    a = pre - noise
    torch.testing.assert_close(gradients[0][0], 0.7 * a / len(a), rtol=1e-14, atol=0)


@pytest.mark.parametrize("moved", [0, 3], ids=["chosen", "rejected"])
@GAMMAS
def test_d2_logit_is_linear_in_the_prediction_at_gamma_1_and_quadratic_below(gamma, moved):
    c, h = 0.7, 0.1
    inputs = predictions()
    direction = torch.zeros_like(inputs[0])
    direction.flatten(1)[:, 0] = 1.0

    def logits(step):
        shifted = [*inputs]
        shifted[moved] = inputs[moved] + step * direction
        return step_dpo_loss(*shifted, coefficient=c, gamma=gamma).logits

    second = (logits(h) - 2 * logits(0.0) + logits(-h)) / h**2
    sign = -1 if moved == 0 else 1
    expected = torch.full_like(second, sign * 2 * c * (1 - gamma))
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-10)


def test_d3_gamma_0_is_diffusion_dpo_in_its_own_convention():
    beta = 5000.0
    inputs = predictions(n=6, shape=(4, 16, 16), dtype=torch.float32)
    theta_w, pre_w, noise, theta_l, pre_l, _ = inputs

    def mse(prediction):
        return (prediction - noise).pow(2).mean(dim=(1, 2, 3))

    model_diff = mse(theta_w) - mse(theta_l)
    ref_diff = mse(pre_w) - mse(pre_l)
    inside = -0.5 * beta * (model_diff - ref_diff)
    expected = -functional.logsigmoid(inside).mean()

    c = dpo_coefficient(beta, noise[0].numel())
    result = step_dpo_loss(*inputs, coefficient=c, gamma=0.0)
    assert c == beta / (2 * 4 * 16 * 16)
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=0)
    assert result.accuracy == (inside > 0).float().mean()


@GAMMAS
def test_d4_swapping_the_pair_negates_the_logit(gamma):
    inputs = predictions()
    there = step_dpo_loss(*inputs, coefficient=0.3, gamma=gamma)
    back = step_dpo_loss(*inputs[3:], *inputs[:3], coefficient=0.3, gamma=gamma)
    assert torch.equal(there.logits, -back.logits)
    assert there.accuracy + back.accuracy == 1


def test_d5_the_advantage_has_zero_mean_on_base_samples_and_that_of_diffusion_dpo_has_not():
    # Base data N(mean, var): eps_pre is the conditional expectation of the noise, in closed form.
    n, mean, var, a = 200_000, 0.5, 0.25, 0.4
    generator = torch.Generator().manual_seed(0)
    x_0 = mean + var**0.5 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    x_t = a**0.5 * x_0 + (1 - a) ** 0.5 * noise
    eps_pre = (1 - a) ** 0.5 * (x_t - a**0.5 * mean) / (a * var + 1 - a)
    eps_theta = eps_pre + 0.2 * torch.tanh(x_t) + 0.1

    paper = implicit_reward(eps_theta, eps_pre, noise, gamma=1.0)
    diffusion_dpo = implicit_reward(eps_theta, eps_pre, noise, gamma=0.0)
    assert abs(paper.mean()) < 4 * paper.std() / n**0.5
    drift = (eps_theta - eps_pre).square().sum(1).mean()
    assert abs(diffusion_dpo.mean() + drift) < 4 * diffusion_dpo.std() / n**0.5
    assert diffusion_dpo.mean() < -20 * diffusion_dpo.std() / n**0.5


@pytest.mark.parametrize(("gamma", "logit", "loss"), [(0.0, 0.06, 0.66360), (1.0, -0.10, 0.74440)])
def test_d6_hand_case(gamma, logit, loss):
    def number(value):
        return torch.tensor([[value]], dtype=torch.float64)

    result = step_dpo_loss(
        number(0.2), number(0.5), number(0.0), number(0.1), number(-0.4), number(0.0),
        coefficient=1.0, gamma=gamma,
    )  # fmt: skip
    assert result.logits.item() == pytest.approx(logit, abs=1e-12)
    assert result.loss.item() == pytest.approx(loss, abs=5e-6)
    assert result.error_gap.item() == pytest.approx(-0.21 + 0.15, abs=1e-12)
    assert result.drift_gap.item() == pytest.approx(0.09 - 0.25, abs=1e-12)
    assert result.drift_chosen.item() == pytest.approx(0.09, abs=1e-12)
    assert result.accuracy.item() == float(logit > 0)


@GAMMAS
def test_logit_is_equation_4_written_out_in_norms(gamma):
    theta_w, pre_w, noise, theta_l, pre_l, _ = inputs = predictions()

    def norm(tensor):
        return tensor.square().sum((1, 2, 3))

    error_gap = norm(noise - theta_w) - norm(noise - pre_w)
    error_gap = error_gap - (norm(noise - theta_l) - norm(noise - pre_l))
    drift_gap = norm(theta_w - pre_w) - norm(theta_l - pre_l)
    result = step_dpo_loss(*inputs, coefficient=0.2, gamma=gamma)
    torch.testing.assert_close(result.logits, -0.2 * (error_gap - gamma * drift_gap))
    torch.testing.assert_close(result.error_gap, error_gap)
    torch.testing.assert_close(result.drift_gap, drift_gap)


def test_small_drift_survives_float32_where_the_difference_of_norms_loses_it():
    theta, pre, noise, *_ = predictions(n=64, shape=(16384,))
    theta = pre + 1e-4 * (theta - pre)
    theta, pre, noise = theta.float(), pre.float(), noise.float()
    exact = implicit_reward(theta.double(), pre.double(), noise.double(), gamma=1.0)
    ours = implicit_reward(theta, pre, noise, gamma=1.0)

    def norm(tensor):
        return tensor.square().sum(1)

    of_norms = -(norm(noise - theta) - norm(noise - pre) - norm(theta - pre))
    assert (ours - exact).abs().max() < (of_norms - exact).abs().max() / 20


def test_bfloat16_predictions_are_compared_in_float32():
    inputs = [tensor.bfloat16() for tensor in predictions(shape=(1024,))]
    result = step_dpo_loss(*inputs, coefficient=0.1)
    exact = step_dpo_loss(*[tensor.double() for tensor in inputs], coefficient=0.1)
    assert result.logits.dtype == torch.float32
    torch.testing.assert_close(result.logits.double(), exact.logits, rtol=1e-4, atol=1e-4)


def test_coefficient_may_differ_per_pair():
    inputs = predictions()
    c = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    unit = step_dpo_loss(*inputs, coefficient=1.0).logits
    torch.testing.assert_close(step_dpo_loss(*inputs, coefficient=c).logits, c * unit)


def test_exact_weight_is_the_kl_between_two_steps_per_squared_noise():
    alpha_bar = make_scheduler().alphas_cumprod.double()
    a, b, eta = alpha_bar[1:], alpha_bar[:-1], 0.8
    var = eta**2 * (1 - b) / (1 - a) * (1 - a / b)

    def mean(eps, x_t=0.3):
        x_0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        return b.sqrt() * x_0 + (1 - b - var).sqrt() * eps

    kl = (mean(1.5) - mean(0.5)).square() / (2 * var)
    torch.testing.assert_close(snr_weight(a, b, eta), kl)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr_weight(a, b)
    torch.testing.assert_close(weight, (snr[:-1] / snr[1:] - 1) / 2, rtol=1e-9, atol=0)
    assert weight[[0, 99, 499]].tolist() == pytest.approx([0.503, 0.0066, 0.0033], rel=0.02)


def test_v_prediction_means_the_noise_it_was_made_from():
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    a = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    column = a.reshape(-1, 1, 1, 1)
    x_t = column.sqrt() * x_0 + (1 - column).sqrt() * noise
    v = column.sqrt() * noise - (1 - column).sqrt() * x_0
    torch.testing.assert_close(to_epsilon(v, x_t, a, "v_prediction"), noise)
    assert to_epsilon(noise, x_t, a, "epsilon") is noise


def test_bad_input_is_named():
    inputs = predictions()
    with pytest.raises(InvalidShape, match=r"\(5, 4, 3, 2\).*\(4, 4, 3, 2\)"):
        step_dpo_loss(*inputs[:5], inputs[5][:4], coefficient=1.0)
    with pytest.raises(InvalidShape, match=r"\(5,\), got \(4,\)"):
        step_dpo_loss(*inputs, coefficient=torch.ones(4))
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\].*1.5"):
        step_dpo_loss(*inputs, coefficient=1.0, gamma=1.5)
    for c in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="coefficient must be >= 0"):
            step_dpo_loss(*inputs, coefficient=c)
    with pytest.raises(ValueError, match="beta_dpo > 0"):
        dpo_coefficient(0.0, 4)
    with pytest.raises(ValueError, match=r"eta must be in \(0, 1\], got 0"):
        snr_weight(torch.tensor(0.4), torch.tensor(0.5), 0.0)
    with pytest.raises(ValueError, match="no variance"):
        snr_weight(torch.tensor(0.5), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"epsilon.*v_prediction.*'sample'"):
        to_epsilon(inputs[0], inputs[0], torch.ones(5), "sample")

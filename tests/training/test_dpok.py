# SPDX-License-Identifier: Apache-2.0
"""The DPOK loss and the policy, on Gaussians that are known in closed form."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.distributions import Normal, kl_divergence

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.reference import ddim_posterior, guide
from msdda_fast.training.adapter import add_lora, base_model, lora_parameters
from msdda_fast.training.dpok import dpok_loss, kl_term
from msdda_fast.training.policy import DDIMPolicy, Transitions, gaussian_log_prob
from msdda_fast.training.step_dpo import snr_weight

from .conftest import SHAPE, make_embeds, make_unet

PROMPTS = torch.tensor([0, 1, 2, 0])
WEIGHTS = {"reward_weight": 1.0, "kl_weight": 0.0, "clip": 1e-4}


def scheduler(**changes):
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(**settings | changes)


class Constant(nn.Module):
    """eps(x_t, t) = theta[k], one number per step of T = 2: the trajectory is linear in theta."""

    def __init__(self, *theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        step = (timestep < 2).long()
        return (self.theta[step].reshape(-1, 1, 1, 1).expand_as(sample),)


def constant_policy(*theta, eta):
    # from t = 3 over t = 1 to t = 0: both steps have a share in x_0
    source = scheduler(
        num_train_timesteps=4, trained_betas=[0.2] * 4, timestep_spacing="trailing", steps_offset=0
    )
    return DDIMPolicy(Constant(*theta), source, torch.zeros(1, 1, 1), num_steps=2, eta=eta)


def unet_policy(**options):
    unet = make_unet()
    add_lora(unet)
    options = {"num_steps": 4, "eta": 0.8} | options
    source = options.pop("scheduler", scheduler())
    policy = DDIMPolicy(unet, source, make_embeds(), -make_embeds()[0], **options)
    return policy, unet


def move(unet, size=0.1):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in lora_parameters(unet):
            parameter += size * torch.randn(parameter.shape, generator=generator)


def roll(policy, count=4, shape=SHAPE, seed=0):
    prompts = PROMPTS[:count] if count <= 4 else torch.zeros(count, dtype=torch.int64)
    x_0, taken = policy.rollout(prompts, shape, torch.Generator().manual_seed(seed))
    return x_0, Transitions.cat(taken)


def loss_of(policy, taken, advantage, **changes):
    moments = policy.moments(taken.x_t, taken.step, taken.prompt_index)
    log_prob = gaussian_log_prob(taken.x_prev, moments.mean, moments.std)
    kl = torch.zeros_like(log_prob)
    return dpok_loss(log_prob, taken.log_prob, advantage, kl, **WEIGHTS | changes)


@pytest.mark.parametrize("eta", [1.0, 0.8])
@pytest.mark.parametrize("baseline", [0.0, 1.5], ids=["no baseline", "baseline"])
def test_policy_gradient_is_the_gradient_of_the_expected_reward(eta, baseline):
    # x_0 = A1 (A0 x_T + B0 theta_0 + s0 z_0) + B1 theta_1 + s1 z_1, reward x_0 + x_0^2 / 2
    theta, count = (-2.0, -1.5), 200_000
    policy = constant_policy(*theta, eta=eta)
    (_, a_1), (b_0, b_1) = policy.x_scale.tolist(), policy.output_scale.tolist()
    slope = torch.tensor([a_1 * b_0, b_1])
    expected = (1 + slope @ torch.tensor(theta)) * slope

    x_0, taken = roll(policy, count, (1, 1, 1))
    reward = (x_0 + x_0.square() / 2).flatten()
    advantage = (reward - baseline).repeat(2)
    loss = loss_of(policy, taken, advantage).loss
    (gradient,) = torch.autograd.grad(loss, policy.unet.theta)
    estimate = -2 * gradient  # the loss is a mean over T = 2 transitions a trajectory

    score = (taken.x_prev - policy.moments(taken.x_t, taken.step, taken.prompt_index).mean) / (
        policy.std[taken.step].reshape(-1, 1, 1, 1) ** 2
    )
    terms = score.flatten().detach() * policy.output_scale[taken.step] * advantage
    error = terms.reshape(2, count).std(1) / count**0.5
    assert ((estimate - expected).abs() < 4 * error).all(), (estimate, expected, error)
    assert (4 * error < 0.1 * expected.abs()).all()  # sharp enough to say something


def test_first_update_has_ratio_one_exactly():
    for options in ({}, {"guidance_scale": 3.0}):
        policy, unet = unet_policy(**options)
        move(unet)
        _, taken = policy.rollout(PROMPTS, SHAPE, torch.Generator().manual_seed(1))
        for step in taken:
            result = loss_of(policy, step, torch.ones(4))
            assert result.ratio.tolist() == [1.0] * 4
            assert result.clip_fraction == 0 and result.loss == -1


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_outside_the_clip_the_gradient_is_exactly_zero_and_inside_it_is_not(advantage):
    policy, unet = unet_policy()
    _, taken = roll(policy)
    move(unet)
    parameters = lora_parameters(unet)
    ones = torch.full((len(taken),), advantage)

    outside = loss_of(policy, taken, ones, clip=1e-9)
    assert outside.clip_fraction == 1
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(outside.loss, parameters))
    inside = loss_of(policy, taken, ones, clip=10.0)
    assert inside.clip_fraction == 0
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(inside.loss, parameters))


def test_clip_bounds_what_the_loss_counts():
    ratios = torch.tensor([0.9, 1.0, 1.00005, 1.2])
    result = dpok_loss(
        ratios.log(), torch.zeros(4), torch.ones(4), torch.zeros(4),
        reward_weight=1000.0, kl_weight=0.1, clip=1e-4,
    )  # fmt: skip
    counted = torch.tensor([0.9999, 1.0, 1.00005, 1.0001])
    torch.testing.assert_close(result.loss, -1000 * counted.mean(), rtol=1e-6, atol=0)
    assert result.clip_fraction == 0.5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_exact_kl_is_the_divergence_of_the_two_gaussians_and_eps_the_published_term(
    prediction_type,
):
    policy, unet = unet_policy(scheduler=scheduler(prediction_type=prediction_type))
    _, taken = roll(policy)
    move(unet)
    arguments = taken.x_t, taken.step, taken.prompt_index
    with torch.no_grad():
        theta = policy.moments(*arguments)
        with base_model(unet):
            pre = policy.moments(*arguments)
    std = theta.std.reshape(-1, 1, 1, 1)
    gaussians = (Normal(m.mean.double(), std.double()) for m in (theta, pre))
    divergence = kl_divergence(*gaussians).flatten(1).sum(1)
    exact, published = kl_term(theta, pre, "exact"), kl_term(theta, pre, "eps")
    torch.testing.assert_close(exact.double(), divergence, rtol=1e-4, atol=0)
    # the weight between the two is the omega_t of step-level DPO, whatever the network predicts
    alpha_bar = scheduler().alphas_cumprod.double()
    t = policy.timesteps[taken.step]
    omega = snr_weight(alpha_bar[t], alpha_bar[(t - 250).clamp_min(0)], 0.8)
    dims = torch.Size(SHAPE).numel()
    torch.testing.assert_close(exact.double(), omega * dims * published, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="kl must be eps or exact, got 'reverse'"):
        kl_term(theta, pre, "reverse")


def test_summed_log_probability_leaves_the_clip_where_the_mean_stays_inside():
    x, std = torch.zeros(1, *SHAPE), torch.ones(1)
    before, after = torch.full_like(x, 0.01), torch.zeros_like(x)
    assert gaussian_log_prob(x, after, std) == pytest.approx(
        Normal(after, 1.0).log_prob(x).mean().item(), rel=1e-6
    )
    for terms, is_inside in ((1, True), (x.numel(), False)):  # the mean, and the sum
        new, old = (terms * gaussian_log_prob(x, m, std) for m in (after, before))
        result = dpok_loss(new, old, torch.ones(1), torch.zeros(1), **WEIGHTS)
        assert result.clip_fraction == (0 if is_inside else 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_policy_is_the_guided_ddim_posterior(prediction_type, guidance_scale):
    source = scheduler(prediction_type=prediction_type)
    policy, unet = unet_policy(scheduler=source, guidance_scale=guidance_scale)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        for k, t in enumerate((751, 501, 251, 1)):
            moments = policy.moments(x, torch.full((4,), k), PROMPTS)
            null = -make_embeds()[:1].expand(4, -1, -1)
            times = torch.full((4,), t)
            uncond, cond = (unet(x, times, e).sample for e in (null, make_embeds()[PROMPTS]))
            output = guide(uncond, cond, guidance_scale)
            ends = [source.alphas_cumprod[max(s, 0)].item() for s in (t, t - 250)]
            mean, var = ddim_posterior(x.double(), output.double(), *ends, 0.8, prediction_type)
            torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                moments.std.double(), var.sqrt().expand(4), rtol=1e-5, atol=0
            )


def test_step_without_variance_is_skipped():
    policy, _ = unet_policy(scheduler=scheduler(set_alpha_to_one=True, steps_offset=0))
    _, taken = roll(policy)
    assert taken.step.unique().tolist() == [0, 1, 2]  # the last of four has sigma = 0
    assert taken.log_prob.isfinite().all()


def test_transitions_of_one_trajectory_stand_together():
    policy, _ = unet_policy()
    x_0, steps = policy.rollout(PROMPTS, SHAPE, torch.Generator().manual_seed(1))
    together = Transitions.by_trajectory(steps)
    assert together.step.tolist() == [0, 1, 2, 3] * 4
    assert torch.equal(together.prompt_index, PROMPTS.repeat_interleave(4))
    assert torch.equal(together.x_prev[:3], together.x_t[1:4])
    assert torch.equal(together.x_prev[3::4], x_0)


def test_rollout_is_decided_by_the_generator():
    policy, _ = unet_policy()
    one, other, third = (roll(policy, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, other) and not torch.equal(one, third)


def test_bad_input_is_named():
    zeros = torch.zeros(3)
    with pytest.raises(InvalidShape, match=r"share a shape \(n,\).*\(3,\), \(2,\), \(3,\), \(3,\)"):
        dpok_loss(zeros, zeros[:2], zeros, zeros, **WEIGHTS)
    with pytest.raises(ValueError, match=r"old_log_prob is torch\.float16, too coarse"):
        dpok_loss(zeros, zeros.half(), zeros, zeros, **WEIGHTS)
    with pytest.raises(InvalidShape, match=r"\(3, 2\), \(3, 1\) and \(3,\)"):
        gaussian_log_prob(torch.zeros(3, 2), torch.zeros(3, 1), zeros)
    with pytest.raises(InvalidSchedule, match=r"eta 0\.0: no step has variance"):
        unet_policy(eta=0.0)
    with pytest.raises(InvalidSchedule, match="clip_sample=False"):
        unet_policy(scheduler=scheduler(clip_sample=True))
    embeds = make_embeds()
    with pytest.raises(InvalidShape, match=r"prompt_embeds must have shape \(P, L, D\)"):
        DDIMPolicy(nn.Identity(), scheduler(), embeds[0], num_steps=2, eta=1.0)
    with pytest.raises(InvalidShape, match=r"null_embeds must have shape \(3, 8\), got \(8,\)"):
        DDIMPolicy(nn.Identity(), scheduler(), embeds, embeds[0, 0], num_steps=2, eta=1.0)
    with pytest.raises(ValueError, match=r"guidance_scale 2\.0 needs null_embeds"):
        DDIMPolicy(
            nn.Identity(), scheduler(), embeds, num_steps=2, eta=1.0, guidance_scale=2.0
        )  # fmt: skip


def test_leaving_the_base_is_paid_for():
    zero, kl = torch.zeros(2), torch.tensor([1.0, 3.0])
    result = dpok_loss(zero, zero, zero, kl, reward_weight=1.0, kl_weight=0.5, clip=0.1)
    assert result.kl == 2 and result.loss == 1

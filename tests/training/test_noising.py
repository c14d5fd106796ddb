# SPDX-License-Identifier: Apache-2.0
"""One batch: what a pair shares, the reference pass, prediction types, exact weights."""

import pytest
import torch

from msdda_fast.errors import InvalidShape
from msdda_fast.training import PreferencePairs, StepDPOConfig, add_lora
from msdda_fast.training.adapter import lora_parameters
from msdda_fast.training.noising import NoisedPairs
from msdda_fast.training.step_dpo import dpo_coefficient, snr_weight, step_dpo_loss

from .conftest import SHAPE, WIDTH, TinyDenoiser, make_embeds, make_pairs, make_scheduler

N = 64


def draw(scheduler=None, pairs=None, null_embeds=None, seed=0, **config):
    """Loss of one batch, and the two calls it made of the network: base model, then model."""
    network = TinyDenoiser().eval()
    add_lora(network)
    generator = torch.Generator().manual_seed(9)
    for parameter in lora_parameters(network):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    config = StepDPOConfig(steps=1, batch_size=N, **config)
    batches = NoisedPairs(
        scheduler or make_scheduler(), pairs or make_pairs(), make_embeds(), null_embeds, config
    )
    result = batches.loss(network, torch.Generator().manual_seed(seed))
    reference, trained = network.calls
    return result, reference, trained, batches


def noise_of(call, x_0, scheduler):
    a = scheduler.alphas_cumprod[call.t].reshape(-1, 1, 1, 1)
    return (call.x_t - a.sqrt() * x_0) / (1 - a).sqrt()


@pytest.mark.parametrize("shared_noise", [True, False])
def test_pair_shares_timestep_prompt_and_by_default_noise(shared_noise):
    pairs = PreferencePairs(
        torch.full((1, *SHAPE), 0.7), torch.full((1, *SHAPE), -0.4), torch.tensor([1])
    )
    scheduler = make_scheduler()
    _, reference, trained, _ = draw(scheduler, pairs, shared_noise=shared_noise)
    assert torch.equal(reference.x_t, trained.x_t)
    assert torch.equal(trained.t[:N], trained.t[N:])
    assert torch.equal(trained.embeds, make_embeds()[1].expand_as(trained.embeds))
    x_0 = torch.cat([pairs.chosen.expand(N, *SHAPE), pairs.rejected.expand(N, *SHAPE)])
    noise = noise_of(trained, x_0, scheduler)
    is_equal = torch.allclose(noise[:N], noise[N:], atol=1e-3)  # abar_0: divided by .03
    assert is_equal == shared_noise
    count = noise.numel()
    assert noise.mean().abs() < 4 / (count / 2) ** 0.5
    assert (noise.square().mean() - 1).abs() < 4 * (2 / (count / 2)) ** 0.5


def test_reference_is_the_base_model_and_only_the_model_gets_a_gradient():
    result, reference, trained, _ = draw()
    base = TinyDenoiser().eval()
    with torch.no_grad():
        (expected,) = base(trained.x_t, trained.t, trained.embeds, return_dict=False)
    torch.testing.assert_close(reference.output, expected)
    assert not reference.output.requires_grad
    assert trained.output.requires_grad
    assert result.drift_chosen.min() > 0


def test_loss_is_that_of_the_drawn_batch():
    pairs = PreferencePairs(
        torch.full((1, *SHAPE), 0.7), torch.full((1, *SHAPE), -0.4), torch.tensor([1])
    )
    scheduler = make_scheduler()
    result, reference, trained, _ = draw(scheduler, pairs, beta_dpo=300.0, gamma=0.4)
    x_0 = torch.cat([pairs.chosen.expand(N, *SHAPE), pairs.rejected.expand(N, *SHAPE)])
    noise = noise_of(trained, x_0, scheduler)
    expected = step_dpo_loss(
        trained.output[:N], reference.output[:N], noise[:N],
        trained.output[N:], reference.output[N:], noise[N:],
        coefficient=dpo_coefficient(300.0, x_0[0].numel()), gamma=0.4,
    )  # fmt: skip
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-3, atol=1e-3)


def test_prompt_dropout_hits_both_of_a_pair():
    null = torch.full_like(make_embeds()[0], 3.0)
    _, reference, trained, _ = draw(null_embeds=null, prompt_dropout=0.4)
    is_null = (trained.embeds == 3.0).all(2).all(1)
    assert torch.equal(is_null[:N], is_null[N:])
    assert abs(is_null.float().mean() - 0.4) < 4 * (0.4 * 0.6 / N) ** 0.5
    assert torch.equal(reference.embeds, trained.embeds)
    assert not (draw(null_embeds=null)[2].embeds == 3.0).any()


def test_velocity_network_gets_the_loss_of_the_noise_it_means():
    pairs, scheduler = make_pairs(), make_scheduler("v_prediction")
    result, reference, trained, batches = draw(scheduler, pairs)
    a = scheduler.alphas_cumprod[trained.t].reshape(-1, 1, 1, 1)
    drift = a.sqrt() * (trained.output - reference.output)
    norm = drift.square().sum((1, 2, 3))
    torch.testing.assert_close(result.drift_chosen, norm[:N], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.drift_rejected, norm[N:], rtol=1e-4, atol=1e-4)
    assert batches.prediction_type == "v_prediction"


def test_exact_weighting_keeps_the_mean_of_the_constant_and_never_draws_t_0():
    two_steps = make_scheduler()
    two_steps.alphas_cumprod = two_steps.alphas_cumprod[[0, 300, 900]]
    alpha_bar = two_steps.alphas_cumprod.double()
    _, _, constant_call, constant = draw(two_steps)
    result, _, call, exact = draw(two_steps, snr_weighting="exact", eta=0.8)
    assert set(constant_call.t.tolist()) == {0, 1, 2}
    assert set(call.t.tolist()) == {1, 2}
    c = dpo_coefficient(5000.0, 4 * 8 * 8)
    assert constant.coefficient.tolist() == [c] * 3
    omega = snr_weight(alpha_bar[1:], alpha_bar[:-1], 0.8)
    torch.testing.assert_close(exact.coefficient[1:], c * omega / omega.mean())
    inner = result.error_gap - result.drift_gap
    torch.testing.assert_close(result.logits, -exact.coefficient[call.t[:N]].float() * inner)


@pytest.mark.parametrize("snr_weighting", ["constant", "exact"])
def test_timesteps_below_the_smallest_are_never_drawn(snr_weighting):
    three_steps = make_scheduler()
    three_steps.alphas_cumprod = three_steps.alphas_cumprod[[0, 300, 600, 900]]
    _, _, call, _ = draw(three_steps, snr_weighting=snr_weighting, min_timestep=2)
    assert set(call.t.tolist()) == {2, 3}


def test_bfloat16_autocast_changes_the_network_and_not_the_arithmetic_of_the_loss():
    result, _, trained, _ = draw(bf16=True)
    assert trained.output.dtype == torch.bfloat16
    assert result.logits.dtype == torch.float32
    exact = draw(bf16=False)[0]
    torch.testing.assert_close(result.drift_chosen, exact.drift_chosen, rtol=0.05, atol=0.0)


def test_seed_decides_the_batch():
    assert torch.equal(draw(seed=3)[0].logits, draw(seed=3)[0].logits)
    assert not torch.equal(draw(seed=3)[0].logits, draw(seed=4)[0].logits)


def test_bad_input_is_named():
    pairs, config = make_pairs(), StepDPOConfig(steps=1)
    with pytest.raises(ValueError, match=r"'sample'.*epsilon.*v_prediction"):
        NoisedPairs(make_scheduler("sample"), pairs, make_embeds(), None, config)
    with pytest.raises(InvalidShape, match=r"\(P, L, D\), got \(3, 8\)"):
        NoisedPairs(make_scheduler(), pairs, make_embeds()[:, 0], None, config)
    with pytest.raises(ValueError, match="from 0 to 2, prompt_embeds has rows 0 to 1"):
        NoisedPairs(make_scheduler(), pairs, make_embeds(2), None, config)
    with pytest.raises(InvalidShape, match=rf"null_embeds.*\(3, {WIDTH}\), got \(2, {WIDTH}\)"):
        NoisedPairs(make_scheduler(), pairs, make_embeds(), torch.zeros(2, WIDTH), config)
    late = StepDPOConfig(steps=1, min_timestep=1000)
    with pytest.raises(ValueError, match=r"min_timestep is 1000, the scheduler has .* 0 to 999"):
        NoisedPairs(make_scheduler(), pairs, make_embeds(), None, late)
    dropping = StepDPOConfig(steps=1, prompt_dropout=0.1)
    with pytest.raises(ValueError, match=r"prompt_dropout = 0.1 needs null_embeds"):
        NoisedPairs(make_scheduler(), pairs, make_embeds(), None, dropping)


@pytest.mark.parametrize(
    "field",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"log_every": 0},
        {"checkpoint_every": 0},
        {"warmup_steps": -1},
        {"min_timestep": -1},
        {"lr": 0.0},
        {"beta_dpo": float("nan")},
        {"grad_clip": -1.0},
        {"gamma": 1.1},
        {"eta": 0.0},
        {"prompt_dropout": 1.0},
        {"ema_decay": 1.0},
        {"snr_weighting": "min_snr"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_configuration_is_validated_at_birth(field):
    ((name, value),) = field.items()
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
        StepDPOConfig(**({"steps": 1} | field))

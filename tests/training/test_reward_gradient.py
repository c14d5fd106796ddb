# SPDX-License-Identifier: Apache-2.0
"""The reward-gradient trainer: its optimum, its range of timesteps, and what a network takes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from msdda_fast.steps.ddim import DDIMRule, ddim_grid
from msdda_fast.steps.flow import flow_grid
from msdda_fast.steps.flow_sde import FlowSDERule
from msdda_fast.training import (
    RewardGradientConfig,
    RewardTask,
    add_lora,
    train_reward_gradient,
)
from msdda_fast.training.rule_policy import RulePolicy

from .conftest import (
    SHAPE,
    WIDTH,
    TinyDenoiser,
    log_of,
    make_embeds,
)

PROMPTS = ["bright", "brighter", "brightest"]
SMALL = {"steps": 4, "batch_size": 4, "scored_steps": 2, "lr": 1e-2, "checkpoint_every": 2}
SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip
RULE = DDIMRule(ddim_grid(SCHEDULER, 3))  # timesteps 667, 334, 1


class Brightness:
    """Mean of the image, whatever the values; can die in a call, as if the process did."""

    name = "brightness"

    def __init__(self, die_at=None, value=None, differentiable=True):
        self.value, self.differentiable = value, differentiable
        self.life = SimpleNamespace(calls=0, die_at=die_at)  # no fingerprint counts what is in here

    def __call__(self, images, prompts):
        self.life.calls += 1
        if self.life.calls == self.life.die_at:
            raise KeyboardInterrupt
        return images.mean(dim=(1, 2, 3)) if self.value is None else self.value


def task(reward=None, **changes):
    made = RewardTask(
        reward=reward or Brightness(),
        decode=lambda latents: latents[:, :3],
        prompts=PROMPTS,
        conditions={"encoder_hidden_states": make_embeds()},
        latent_shape=SHAPE,
    )
    return replace(made, **changes)


def train(
    out_dir, work=None, network=None, rule=RULE, curves=False, rank=4, dtype=torch.float32, **config
):
    """Train a fresh network, as a new process would, and return it."""
    network = network or TinyDenoiser()
    add_lora(network, rank=rank)
    train_reward_gradient(
        network, rule, work or task(), RewardGradientConfig(**SMALL | config), out_dir,
        weight_dtype=dtype, curves=curves, progress=False,
    )  # fmt: skip
    return network


class Shift(nn.Module):
    """A Gaussian policy: an output of the text alone, 0 in the base, that a LoRA can learn."""

    def __init__(self):
        super().__init__()
        self.to_v = nn.Linear(WIDTH, SHAPE[0], bias=False)
        nn.init.zeros_(self.to_v.weight)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        shift = self.to_v(encoder_hidden_states.mean(1))[:, :, None, None]
        return (0.1 * sample + shift,)


def ddim_numbers(eta):
    """Return timesteps, dx0hat/dm, B and tau of RULE, step by step, from Song's equations."""
    for t, before in ((667, 334), (334, 1), (1, -332)):
        a = SCHEDULER.alphas_cumprod[t].double().item()
        p = SCHEDULER.alphas_cumprod[max(before, 0)].double().item()
        tau2 = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
        b = (1 - p - tau2) ** 0.5 - (p * (1 - a) / a) ** 0.5
        yield t, -(((1 - a) / a) ** 0.5), b, tau2**0.5


def flow_rule():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.6, 0.3])
    return FlowSDERule(flow_grid(scheduler))


def flow_numbers(level):
    """The same of `flow_rule`, from Flow-GRPO's equations."""
    for t, r in ((0.9, 0.6), (0.6, 0.3), (0.3, 0.0)):
        d, g = r - t, level * (t / (1 - t)) ** 0.5
        yield 1000 * t, -t, (1 + g**2 * (1 - t) / (2 * t)) * d, g * (-d) ** 0.5


@pytest.mark.parametrize(
    ("rule", "level", "numbers", "timesteps"),
    [
        (RULE, 1.0, ddim_numbers, None),
        (RULE, 0.8, ddim_numbers, (300, 999)),
        (flow_rule(), 0.7, flow_numbers, None),
        (flow_rule(), 0.5, flow_numbers, (500, 950)),
    ],
    ids=["ddim", "ddim in a range", "flow", "flow in a range"],
)
def test_the_policy_reaches_the_optimum_that_is_known_in_closed_form(
    tmp_path, rule, level, numbers, timesteps
):
    """A shift s of m moves the reward by x' s and costs B^2 s^2 / 2 tau^2 per dimension and step:

    with lambda, n steps and d dimensions of a channel, of the three that the reward looks at, the
    maximum of mean(x') s / 3 - lambda d sum(B^2 / tau^2) s^2 / 2 is at mean(x') / (3 lambda d sum).
    """
    low, high = timesteps or (0, 1000)
    steps = [row for row in numbers(level) if low <= round(row[0]) <= high]
    assert len(steps) == (3 if timesteps is None else 2)
    slope = sum(row[1] for row in steps) / len(steps) / 3
    curvature = SHAPE[1] * SHAPE[2] * sum((b / tau) ** 2 for _, _, b, tau in steps)
    kl_weight = abs(slope) / curvature  # puts the optimum at 1
    network = train(
        tmp_path, network=Shift(), rule=rule, level=level, timesteps=timesteps, steps=120, lr=0.03,
        kl_weight=kl_weight, scored_steps=3, batch_size=3, grad_clip=1e9, checkpoint_every=1000,
    )  # fmt: skip
    with torch.no_grad():
        shift = network.to_v(make_embeds().mean(1))
    optimum = torch.tensor([1.0, 1.0, 1.0, 0.0]) * torch.sign(torch.tensor(slope))
    torch.testing.assert_close(shift, optimum.expand(3, 4), atol=0.03, rtol=0)
    # at the optimum of a quadratic the price is half of the gain
    path_kl = curvature * 3 / 2
    assert log_of(tmp_path)[-1]["kl"] == pytest.approx(path_kl, rel=0.05)


def test_outside_of_the_range_the_base_acts_and_nothing_is_scored(tmp_path):
    network = train(tmp_path, timesteps=(300, 400), steps=2, scored_steps=5)
    times = [int(call.t[0]) for call in network.calls]
    assert times == [667, 334, 334] * 2  # the base; the base and the adapter; no third step
    assert log_of(tmp_path)[0]["kl"] == 0 < log_of(tmp_path)[1]["kl"]


def test_the_guided_policy_is_the_guided_model():
    network = TinyDenoiser().eval()
    rows, null, x_t = make_embeds(), torch.ones(3, WIDTH), torch.randn(2, *SHAPE)
    add_lora(network)
    policy = RulePolicy(
        network, RULE, 1.0, {"encoder_hidden_states": rows}, {"encoder_hidden_states": null},
        guidance_scale=3.0,
    )  # fmt: skip
    found = policy.output(x_t, 1, torch.tensor([2, 0]))
    t = torch.tensor([334, 334])
    (cond,) = network(x_t, t, rows[[2, 0]], return_dict=False)
    (uncond,) = network(x_t, t, null.expand(2, -1, -1), return_dict=False)
    torch.testing.assert_close(found, uncond + 3 * (cond - uncond))


def test_any_arguments_of_the_network_are_conditions(tmp_path):
    class Pooled(TinyDenoiser):
        def forward(self, hidden_states, timestep, encoder_hidden_states, pooled, return_dict):
            assert encoder_hidden_states.mean(1).shape == pooled.shape == (4, WIDTH)
            torch.testing.assert_close(encoder_hidden_states.mean(1), pooled)  # rows of one prompt
            return super().forward(hidden_states, timestep, encoder_hidden_states, return_dict)

    embeds = make_embeds()
    rows = {"encoder_hidden_states": embeds, "pooled": embeds.mean(1)}
    network = train(tmp_path, task(conditions=rows), Pooled(), rule=flow_rule())
    assert network.calls[0].t.dtype == torch.float32 and network.calls[0].t[0] == 900

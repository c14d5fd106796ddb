# SPDX-License-Identifier: Apache-2.0
"""A fused scheduler against Algorithm 1 with M stock schedulers, each with its own history."""

import copy
import inspect

import diffusers
import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast.pipelines.stock_schedulers import LINEAR

VP = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
WEIGHTS = torch.tensor([[0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
SHAPE = (2, 4, 8, 8)
T = 6


def scheduler(name: str, **config: object) -> object:
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    usual = {**VP, "clip_sample": False, "skip_prk_steps": True, "noise_sampler_seed": 3}
    if "sigma_min" in known or "shift" in known or "flow_shift" in config:
        usual = {}
    if kind.__module__.startswith("diffusers.utils.dummy"):
        pytest.skip(f"{name} needs a package that is not installed")
    return kind(**{key: value for key, value in usual.items() if key in known} | config)


def set_timesteps(one: object) -> None:
    middle = {"intermediate_timesteps": None} if isinstance(one, diffusers.SCMScheduler) else {}
    one.set_timesteps(T, **middle)


def drawn(k: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + k)


def stock_step(one: object, k: int, output: Tensor, t: Tensor, x: Tensor, **arguments: object):
    if hasattr(one, "scale_model_input"):
        one.scale_model_input(x, t)
    takes = inspect.signature(one.step).parameters
    if "generator" in takes:
        arguments["generator"] = drawn(k)
    if "old_pred_original_sample" in takes:  # CogVideoX hands the last x_0 around
        arguments |= {"old_pred_original_sample": None, "timestep_back": None}
    torch.manual_seed(k)
    return one.step(output, timestep=t, sample=x, return_dict=False, **arguments)[0]


def in_lockstep(one: object, outputs: Tensor, **arguments: object):
    """Step M copies of the scheduler from the same state, and average: Eq. 7 at equal levels."""
    x = torch.randn(SHAPE, generator=drawn(0)) * float(getattr(one, "init_noise_sigma", 1.0))
    copies = [copy.deepcopy(one) for _ in WEIGHTS[0]]
    w = WEIGHTS.T[:, :, None, None, None]
    timesteps = one.timesteps[: -1 if "SCM" in type(one).__name__ else None]
    for k, t in enumerate(timesteps):
        yield k, t, x
        steps = [
            stock_step(each, k, output, t, x, **arguments)
            for each, output in zip(copies, outputs[k], strict=True)
        ]
        x = (w * torch.stack(steps).double()).sum(0).to(steps[0].dtype)
    yield None, None, x


CASES = {
    **{name: (name, {}, {}) for name in sorted(LINEAR)},
    "DDIM, eta 1": ("DDIMScheduler", {}, {"eta": 1.0}),
    "Euler, churn": ("EulerDiscreteScheduler", {}, {"s_churn": 4.0}),
    "Heun, churn": ("FlowMatchHeunDiscreteScheduler", {}, {"s_churn": 2.0}),
    "UniPC, flow": ("UniPCMultistepScheduler", FLOW, {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "DPM++ 2M SDE, flow": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"} | FLOW, {}
    ),
    "FlowMatchEuler, shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    "FlowMatchEuler, stochastic": (
        "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {}
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_equal_levels_are_the_stock_scheduler_on_the_mean(case: str) -> None:
    name, config, arguments = CASES[case]
    one = scheduler(name, **config)
    fused = mf.fused_scheduler(one, weights=WEIGHTS)
    assert isinstance(fused, type(one)) and type(fused).__name__ == name
    assert inspect.signature(type(fused).step) == inspect.signature(type(one).step)
    set_timesteps(one)
    set_timesteps(fused)
    outputs = torch.randn(len(one.timesteps), 2, *SHAPE, generator=drawn(1))
    y = None
    for k, t, x in in_lockstep(one, outputs, **arguments):
        assert y is None or (x - y).abs().max() <= 1e-5 * x.abs().max()
        if t is not None:
            y = stock_step(fused, k, outputs[k], t, x if y is None else y, **arguments)

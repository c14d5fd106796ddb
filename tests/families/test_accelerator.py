# SPDX-License-Identifier: Apache-2.0
"""Few steps in any pipeline: an accelerator in every objective, under the samplers for it."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler, TCDScheduler
from safetensors.torch import save_file

import msdda_fast as mf
from msdda_fast.errors import AdapterMismatch
from msdda_fast.pipelines.attach import attach
from tests.families import images, xl
from tests.families.lockstep import draw, equal_levels, lockstep, made, quiet, unequal_levels
from tests.families.test_families import CLOSE, error, weights_for
from tests.families.test_saving import absent, saved  # noqa: F401 - a fixture

#: "b" is the accelerator, with which "a" and the base are objectives.
FAST = {"fast a": mf.Objective(["a", "b"]), "fast": mf.Objective("b", eta=0.8)}
SETS = [{"a": 1.0, "b": 1.0}, {"b": 1.0}]


def sampled_by(make, scheduler):
    """`make`'s pipeline with another scheduler."""

    def made_so():
        pipe, call = make()
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        return pipe, call

    return made_so


SAMPLED = {
    "SDXL, LCM": sampled_by(xl.text, LCMScheduler),
    "SDXL, TCD": sampled_by(xl.text, TCDScheduler),
    "SD3, LCM": sampled_by(images.sd3, FlowMatchLCMScheduler),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_two_objectives_are_algorithm_1(name):
    """At levels of the samplers' own: DDIM's eta of an objective is none of them."""
    make = SAMPLED[name]
    pipe, call = made(make)
    weights = weights_for(call)
    expected = lockstep(make, SETS, equal_levels(weights))
    assert error(draw(attach(pipe, FAST), call, weights=weights), expected) < CLOSE


def tcd(met, k: int, root: float) -> tuple[torch.Tensor, float]:
    """Mean and deviation of TCD's step (2402.19159) at gamma = root^2, from diffusers' own.

    In the last step, which has no noise, variances are as gammas in the limit, hence the root.
    """
    gamma = root**2
    after = int(met.scheduler.timesteps[k + 1]) if k + 1 < len(met.scheduler.timesteps) else 0
    bars = met.scheduler.alphas_cumprod.double()
    up = float(bars[after] / bars[int((1 - gamma) * after)])
    given = {**met.arguments, "eta": gamma, "generator": torch.Generator(), "return_dict": True}
    made = met.stock_step(met.scheduler, **given)
    met.scheduler._step_index -= 1  # `unequal_levels` counts
    return up**0.5 * made.pred_noised_sample.double(), (1 - up) ** 0.5


def cps(met, k: int, a: float) -> tuple[torch.Tensor, float]:
    """Mean and deviation of coefficients-preserving sampling (2509.05952)."""
    t, r = (float(met.scheduler.sigmas[k + i]) for i in (0, 1))
    x, v = (met.arguments[name].double() for name in ("sample", "model_output"))
    tau = r * torch.tensor(a * torch.pi / 2, dtype=torch.float64).sin()
    return (1 - r) * (x - t * v) + (r**2 - tau**2).sqrt() * (x + (1 - t) * v), float(tau)


UNEQUAL = {
    "TCD": (SAMPLED["SDXL, TCD"], tcd, (0.8, 0.5), [0.64, 0.25]),
    "CPS": (images.sd3, cps, (0.5, 0.5), [mf.CPS(0.5), mf.CPS(0.5)]),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_levels_of_the_call_are_algorithm_1(name):
    make, moments, own, levels = UNEQUAL[name]
    pipe, call = made(make)
    weights = weights_for(call)
    seeds = [3 + 1000 * i for i in range(len(weights))]
    got = draw(attach(pipe, FAST), call, weights=weights, levels=levels, seed=seeds)
    fuse = unequal_levels(weights, seeds, moments, own)
    expected = lockstep(make, SETS, fuse, seeds=seeds)
    assert error(got, expected) < CLOSE


def test_from_pretrained(saved):  # noqa: F811
    """The base with the accelerator stands in for an objective outside of its timesteps."""
    pipe, call, folder = saved
    files = {name: folder / f"{name}.safetensors" for name in "ab"}
    objectives = {"a": mf.Objective(files["a"], scale=0.5, timesteps=(500, 1000))}
    loaded = quiet(
        mf.MSDDAPipeline.from_pretrained(
            folder / "base", objectives=objectives, accelerator=files["b"], **absent(pipe)
        )
    )
    flow = "Flow" in type(pipe.scheduler).__name__
    assert type(loaded.scheduler) is (type(pipe.scheduler) if flow else LCMScheduler)
    assert loaded.accelerator.source == files["b"]
    reference = {"on": mf.Objective(["a", "b"], scale=[0.5, 1.0]), "off": mf.Objective("b")}
    reference = quiet(mf.MSDDAPipeline.from_pipe(pipe, objectives=reference))
    reference.scheduler = loaded.scheduler
    seen = []
    note = {"callback_on_step_end": lambda p, k, t, d: seen.append(float(t)) or d}
    got = draw(loaded, call | note, seed=0)
    assert min(seen) < 500 < max(seen)
    weights = [[1.0, 0.0] if t >= 500 else [0.0, 1.0] for t in seen]
    assert error(got, draw(reference, call, weights=lambda k: weights[k], seed=0)) < CLOSE

    loaded.save_pretrained(folder / "out")
    again = quiet(mf.MSDDAPipeline.from_pretrained(folder / "out", **absent(pipe)))
    assert again.accelerator.steps == loaded.accelerator.steps
    assert error(draw(again, call, seed=0), got) < CLOSE
    assert error(draw(quiet(mf.MSDDAPipeline.from_pipe(again)), call, seed=0), got) < CLOSE
    stock = diffusers.DiffusionPipeline.from_pretrained(folder / "out", **absent(pipe))
    assert type(stock.scheduler) is type(loaded.scheduler)


def test_one_for_another_base_is_named(saved):  # noqa: F811
    pipe, _, folder = saved
    with pytest.raises(AdapterMismatch, match="ships with none"):
        mf.MSDDAPipeline.from_pretrained(folder / "base", accelerator="own", **absent(pipe))
    other = folder / "b.safetensors"
    wrong = "transformer" if hasattr(pipe, "unet") else "unet"
    factors = {f"{wrong}.nowhere.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(factors, other)
    with pytest.raises(mf.MSDDAError, match="'accelerator'"):
        mf.MSDDAPipeline.from_pretrained(folder / "base", accelerator=other, **absent(pipe))

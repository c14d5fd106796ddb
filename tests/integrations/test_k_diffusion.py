# SPDX-License-Identifier: Apache-2.0
"""Fused Euler ancestral sampling: k-diffusion's sampler at one-hot weights, Eq. 7 in between."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast.integrations.k_diffusion import sample_msdda
from msdda_fast.reference import algorithm_1
from msdda_fast.steps.shares import fusion_shares
from tests.gaussian_world import (
    Gaussian,
    Step,
    fuse_step,
    grid,
    measured_moments,
    moments,
    sd15_scheduler,
)

SHAPE = (3, 4, 5, 6)
SIGMAS = torch.tensor([14.6, 6.0, 2.5, 1.0, 0.4, 0.03, 0.0], dtype=torch.float64)
EXPERTS = (Gaussian(1.0, 0.25), Gaussian(-1.0, 0.5), Gaussian(0.3, 0.04))


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return (SIGMAS[0] * noise).to(dtype)


def denoiser(gain: float) -> Callable[..., Tensor]:
    """A denoiser that is neither linear nor the same everywhere."""

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1, 1, 1)
        return torch.tanh(gain * x / (1 + level)) + 0.1 * x.roll(1, -1) / (1 + level**2)

    return denoised


def never(x: Tensor, sigma: Tensor) -> Tensor:
    raise AssertionError("called without weight")


MODELS = [denoiser(0.5), denoiser(1.5), denoiser(-0.8)]


def kernel(model: Callable[..., Tensor], x: Tensor, s: Tensor, r: Tensor, eta: float):
    """Mean and std of one Euler ancestral step as k-diffusion takes it, from its definition."""
    up = min(r, eta * (r**2 * (s**2 - r**2) / s**2) ** 0.5)
    down = (r**2 - up**2) ** 0.5
    slope = (x - model(x, s.expand(len(x)))) / s
    return x + slope * (down - s), torch.as_tensor(up)


def euler_ancestral(model: Callable[..., Tensor], x: Tensor, eta: float, s_noise: float) -> Tensor:
    for s, r in pairwise(SIGMAS):
        mean, up = kernel(model, x, s, r, eta)
        x = mean + (torch.randn_like(x) * s_noise * up if r > 0 else 0.0)
    return x


@pytest.mark.parametrize("chosen", [0, 1, 2])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, 1.05, 7.0])
def test_one_hot_weights_are_that_denoisers_own_sampler(eta: float, chosen: int) -> None:
    models = [model if m == chosen else never for m, model in enumerate(MODELS)]
    weights = [float(m == chosen) for m in range(3)]
    torch.manual_seed(5)
    expected = euler_ancestral(MODELS[chosen], start(), eta, s_noise=0.9)
    torch.manual_seed(5)
    x_0 = sample_msdda(
        models, start(), SIGMAS, weights=weights, etas=[eta] * 3, s_noise=0.9, disable=True
    )
    assert (x_0 - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("etas", [(1.0, 0.8, 0.5), (1.3, 0.8, 9.0)], ids=["unclipped", "clipped"])
def test_fusion_is_equation_7_of_the_kernels(etas: tuple[float, ...]) -> None:
    levels = SIGMAS[:-1]  # Eq. 7 divides by up_i, which is 0 at the last step
    noise = torch.randn(len(levels) - 1, *SHAPE, dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]]).double()
    posteriors = [
        lambda x, k, model=model, eta=eta: (
            (step := kernel(model, x, levels[k], levels[k + 1], eta))[0],
            step[1] ** 2,
        )
        for model, eta in zip(MODELS, etas, strict=True)
    ]
    draws = iter(noise)
    x_0 = sample_msdda(
        MODELS,
        start(),
        levels,
        weights=weights,
        etas=etas,
        noise_sampler=lambda sigma, sigma_next: next(draws),
        disable=True,
    )
    expected = algorithm_1(posteriors, (weights / weights.sum(1, True)).T, start(), noise)
    assert (x_0 - expected).abs().max() <= 1e-12


def ve_denoiser(data: Gaussian) -> Callable[..., Tensor]:
    """The ideal denoiser E[x_0 | x] of N(mean, var) under x = x_0 + sigma eps."""

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        var = sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2
        return (data.var * x + var * data.mean) / (data.var + var)

    return denoised


def ve_step(data: Gaussian, s: float, r: float, eta: float) -> Step:
    """The exact affine step x_prev = scale x + shift + sqrt(var) z, in plain floats."""
    up = min(r, eta * r * math.sqrt(1 - (r / s) ** 2))
    down = math.sqrt(r**2 - up**2)
    gain, offset = data.var / (data.var + s**2), s**2 * data.mean / (data.var + s**2)
    return Step(down / s + (1 - down / s) * gain, (1 - down / s) * offset, up**2)


def fused_ve_chain(weights: Sequence[float], etas: Sequence[float], sigmas: Tensor) -> list[Step]:
    chain = [Step(float(sigmas[0]), 0.0, 0.0)]
    for s, r in pairwise(sigmas.tolist()):
        steps = [ve_step(data, s, r, eta) for data, eta in zip(EXPERTS, etas, strict=True)]
        if r == 0:  # any common factor in place of the vanished one
            steps = [
                step._replace(var=min(eta, 1.0) ** 2) for step, eta in zip(steps, etas, strict=True)
            ]
        fused = fuse_step(steps, weights)
        chain.append(fused._replace(var=0.0) if r == 0 else fused)
    return chain


@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (0.0, 0.6, 0.4), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("etas", [(1.0, 0.8, 0.5), (1.2, 0.5, 4.0)], ids=["unclipped", "clipped"])
def test_moments_of_x_0_are_exact_on_the_gaussian_world(weights, etas) -> None:
    sigmas = torch.cat([torch.logspace(1.2, -1.5, 24, dtype=torch.float64), torch.zeros(1)])

    def sample(x_T: Tensor, noise: Tensor) -> Tensor:
        draws = iter(noise)
        models = [ve_denoiser(data) for data in EXPERTS]
        return sample_msdda(
            models,
            sigmas[0] * x_T,
            sigmas,
            weights=weights,
            etas=etas,
            noise_sampler=lambda sigma, sigma_next: next(draws),
            disable=True,
        )

    measured = measured_moments(sample, num_steps=24)
    exact = moments(fused_ve_chain(weights, etas, sigmas))
    assert measured == pytest.approx(exact, rel=1e-11)


@pytest.mark.parametrize("to_one", [False, True], ids=["last sigma > 0", "last sigma 0"])
@pytest.mark.parametrize("etas", [(1.0, 0.8, 0.5), (0.7, 0.7, 0.7), (0.0, 0.0, 0.0)])
def test_it_is_fused_ddim_under_the_change_of_variables(etas, to_one: bool) -> None:
    num_steps = 20
    scheduler = sd15_scheduler(set_alpha_to_one=to_one)
    rows = grid(scheduler, num_steps)
    alpha_bar = torch.tensor([a for _, a, _ in rows] + [rows[-1][2]], dtype=torch.float64)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    weights = [0.2, 0.3, 0.5]
    x_T = torch.randn(SHAPE, dtype=torch.float64)
    noise = torch.randn(num_steps, *SHAPE, dtype=torch.float64)

    def eps(model: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def predicted(x_t: Tensor, t: Tensor) -> Tensor:
            a = scheduler.alphas_cumprod[t]
            sigma, x = ((1 - a) / a).sqrt(), x_t / a.sqrt()
            return (x - model(x, sigma.expand(len(x)))) / sigma

        return predicted

    x_ddim = mf.denoise(
        [eps(model) for model in MODELS],
        x_T,
        scheduler=scheduler,
        num_steps=num_steps,
        weights=weights,
        etas=etas,
        noise=noise,
    )
    draws = iter(noise)
    x_ancestral = sample_msdda(
        MODELS,
        x_T / alpha_bar[0].sqrt(),
        sigmas,
        weights=weights,
        etas=etas,
        noise_sampler=lambda sigma, sigma_next: next(draws),
        disable=True,
    )
    assert (alpha_bar[-1].sqrt() * x_ancestral - x_ddim).abs().max() <= 1e-10


def test_a_denoiser_is_called_only_at_steps_that_give_it_weight() -> None:
    calls: list[list[float]] = [[], []]

    def counted(m: int) -> Callable[..., Tensor]:
        def denoised(x: Tensor, sigma: Tensor, *, cond: str) -> Tensor:
            assert sigma.shape == (len(x),) and cond == "dog"
            calls[m].append(float(sigma[0]))
            return MODELS[m](x, sigma)

        return denoised

    sample_msdda(
        [counted(0), counted(1)],
        start(),
        SIGMAS,
        {"cond": "dog"},
        weights=lambda k: [1.0, 0.0] if k < 2 else [0.5, 0.5] if k < 4 else [0.0, 1.0],
        etas=[1.0, 0.5],
        disable=True,
    )
    levels = SIGMAS.tolist()
    assert calls == [levels[:4], levels[2:6]]


def test_each_sample_has_its_own_weights_and_noise() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.4, 0.6], [0.0, 1.0]])
    seeds = [11, 12, 13]

    def poisoned(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = MODELS[1](x, sigma)
        return denoised.masked_fill((x == x[:1]).flatten(1).all(1).reshape(-1, 1, 1, 1), math.nan)

    def sample(rows: slice, second: Callable[..., Tensor]) -> Tensor:
        return sample_msdda(
            [MODELS[0], second],
            start(torch.float32)[rows],
            SIGMAS,
            weights=weights[rows],
            etas=[1.0, 0.8],
            seeds=seeds[rows],
            disable=True,
        )

    together = sample(slice(None), poisoned)  # NaN where the first sample gives no weight
    alone = [sample(slice(b, b + 1), MODELS[1]) for b in range(3)]
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.cat(alone))


def test_the_callback_sees_each_step_and_its_fused_prediction() -> None:
    seen: list[dict] = []
    etas = [1.0, 0.8, 0.5]
    x_0 = sample_msdda(
        MODELS,
        start(),
        SIGMAS,
        None,
        seen.append,
        True,
        weights=[0.2, 0.3, 0.5],
        etas=etas,
        seeds=[1, 2, 3],
    )
    assert [event["i"] for event in seen] == list(range(6))
    assert [float(event["sigma"]) for event in seen] == SIGMAS[:-1].tolist()
    assert torch.equal(seen[0]["x"], start())
    first = seen[0]
    share, _ = fusion_shares(torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor(etas).double())
    sigma = SIGMAS[:1].expand(3)
    expected = sum(s * model(start(), sigma) for s, model in zip(share, MODELS, strict=True))
    assert (first["denoised"] - expected).abs().max() <= 1e-6  # these weights and etas are float32
    assert torch.equal(seen[-1]["denoised"], x_0)  # the last step goes there


def test_noise_is_asked_for_as_in_k_diffusion() -> None:
    asked: list[tuple[float, float]] = []

    def noise_sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        asked.append((float(sigma), float(sigma_next)))
        return torch.zeros(SHAPE, dtype=torch.float64)

    sample_msdda(MODELS[:1], start(), SIGMAS, etas=[1.0], noise_sampler=noise_sampler, disable=True)
    assert asked == list(pairwise(SIGMAS.tolist()))[:-1]


def test_a_step_of_no_length_leaves_x() -> None:
    x = sample_msdda(MODELS, start(), SIGMAS[[0, 0]], etas=[1.0, 0.5, 0.7], disable=True)
    torch.testing.assert_close(x, start(), rtol=1e-15, atol=0)


def test_half_precision_keeps_its_dtype() -> None:
    x = start().half()
    x_0 = sample_msdda(MODELS, x, SIGMAS, etas=[1.0, 0.5, 0.7], seeds=[1, 2, 3], disable=True)
    assert x_0.dtype == torch.float16 and x_0.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"models": []}, mf.InvalidShape, "0 denoisers"),
        ({"x": torch.zeros(())}, mf.InvalidShape, r"shape \(\)"),
        ({"sigmas": torch.ones(2, 2)}, mf.InvalidShape, r"\(T \+ 1,\)"),
        ({"sigmas": torch.tensor([1.0, 2.0])}, mf.InvalidSchedule, "not increase"),
        ({"sigmas": torch.tensor([1.0, 0.0, 0.0])}, mf.InvalidSchedule, "positive but for a last"),
        ({"sigmas": torch.tensor([math.nan, 0.0])}, mf.InvalidSchedule, "finite"),
        ({"etas": [1.0]}, mf.InvalidShape, r"etas have shape \(1,\)"),
        ({"etas": torch.tensor(1.0)}, mf.InvalidShape, r"etas have shape \(\)"),
        (
            {"etas": [1.0, 1.0, -0.1]},
            mf.InvalidSchedule,
            r"objective 2: eta must lie in \[0, inf\), got -0.1; .*Euler ancestral",
        ),
        ({"etas": [1.0, 1.0, 0.0]}, mf.ZeroVariance, "mix zero and positive"),
        ({"weights": [0.5, 0.6, 0.1]}, mf.InvalidWeights, "sum to 1.2"),
        ({"weights": [[0.5, 0.3, 0.2]] * 2}, mf.InvalidShape, "weights have shape"),
        ({"s_noise": -1.0}, mf.InvalidSchedule, "s_noise"),
        ({"seeds": [1, 2]}, mf.InvalidShape, "seeds"),
        ({"seeds": [1, 2, 3], "noise_sampler": print}, ValueError, "at most one"),
        ({"models": [lambda x, s: x[:1]] * 3}, mf.InvalidShape, r"models\[2\] returned"),
        ({"noise_sampler": lambda s, r: torch.zeros(2)}, mf.InvalidShape, "noise"),
        ({"backend": "fast"}, mf.BackendUnavailable, "fast"),
    ],
)
def test_bad_input_is_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"models": MODELS, "x": start(), "sigmas": SIGMAS, "etas": [1.0, 0.8, 0.5]}
    with pytest.raises(error, match=message):
        sample_msdda(**(arguments | changes), disable=True)


@pytest.mark.parametrize("sigmas", [torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([])])
def test_without_a_step_the_state_is_returned_and_no_denoiser_is_asked(sigmas: Tensor) -> None:
    x = start()

    def never(*_: object) -> Tensor:
        raise AssertionError("asked")

    result = sample_msdda([never] * 3, x, sigmas, etas=[1.0, 0.8, 0.5], callback=never)
    assert torch.equal(result, start())
    with pytest.raises(mf.InvalidShape, match="etas have shape"):
        sample_msdda([never] * 3, x, sigmas, etas=[1.0])

# SPDX-License-Identifier: Apache-2.0
"""Flow models in k-diffusion's conventions, and preferences per pixel and per range of sigma."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import msdda_fast as mf
from msdda_fast.integrations.k_diffusion import sample_msdda
from tests.gaussian_world import Gaussian, Step, fuse_step, measured_moments, moments
from tests.steps.flow_world import chain, cps, dance, flow_ddim, flow_grpo, flow_scheduler, times

SCHEDULER = flow_scheduler(8)
SIGMAS = SCHEDULER.sigmas
SHAPE = (2, 3, 5, 4)
EXPERTS = (Gaussian(1.0, 0.25), Gaussian(-1.0, 0.5), Gaussian(0.3, 0.04))
WEIGHTS = (0.2, 0.3, 0.5)


def denoiser(data: Gaussian, *, flow: bool = True) -> Callable[..., Tensor]:
    """E[x_0 | x] of data under x = (1 - sigma) x_0 + sigma eps, or x_0 + sigma eps."""

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        scale = 1 - s if flow else torch.ones_like(s)
        total = scale**2 * data.var + s**2
        return (scale * data.var * x + s**2 * data.mean) / total

    return denoised


def sample(x: Tensor, sigmas: Tensor = SIGMAS, experts: Sequence[Gaussian] = EXPERTS, **options):
    models = [denoiser(data, flow="etas" not in options or "flow" in options) for data in experts]
    return sample_msdda(models, x, sigmas, disable=True, **options)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ancestral_rf(t: float, r: float, eta: float) -> tuple[float, float, float]:
    """A, B and tau of ComfyUI's `sample_euler_ancestral_RF`, in the velocity."""
    down = r * (1 + (r / t - 1) * eta)
    kept = (1 - r) / (1 - down)
    noise = math.sqrt(max(r**2 - down**2 * kept**2, 0.0))

    def mean(x: float, v: float) -> float:
        denoised = x - t * v
        return kept * (down / t * x + (1 - down / t) * denoised)

    return mean(1.0, 0.0), mean(0.0, 1.0), noise


def fused(steps: Sequence[Callable[[float, float], tuple]], limits: Sequence[float]) -> list[Step]:
    """The fused chain of EXPERTS; `limits`: what stands for tau in a last step without noise."""
    chains = [chain(data, SCHEDULER, step) for data, step in zip(EXPERTS, steps, strict=True)]
    result = []
    for at_once in zip(*chains, strict=True):
        ends = all(step.var == 0 for step in at_once)
        if ends:
            at_once = [s._replace(var=c**2) for s, c in zip(at_once, limits, strict=True)]
        step = fuse_step(at_once, WEIGHTS)
        result.append(step._replace(var=0.0) if ends else step)
    return result


KINDS = {
    "ancestral": ((1.0, 0.8, 0.5), None, lambda eta: math.sqrt(eta * (2 - eta)), ancestral_rf),
    "FlowSDE": ((0.7, 0.4, 1.2), mf.FlowSDE, float, None),
    "DanceSDE": ((0.3, 0.5, 0.2), mf.DanceSDE, float, dance),
    "FlowDDIM": ((1.0, 0.8, 0.5), mf.FlowDDIM, float, flow_ddim),
    "CPS": ((0.8, 0.8, 0.8), mf.CPS, lambda a: math.sin(a * math.pi / 2), cps),
}


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_x_0_are_exact_on_the_gaussian_world(kind: str) -> None:
    values, noise, limit, step = KINDS[kind]
    ceiling = times(SCHEDULER)[0][1]
    of = step or (lambda t, r, a: flow_grpo(t, r, a, ceiling))
    exact = fused([lambda t, r, a=a: of(t, r, a) for a in values], [limit(a) for a in values])
    levels = {"levels": [noise(a) for a in values]} if noise else {"etas": values, "flow": True}

    def run(x_T: Tensor, z: Tensor) -> Tensor:
        draws = iter(z)
        return sample(x_T, weights=WEIGHTS, noise_sampler=lambda *_: next(draws), **levels)

    measured = measured_moments(run, num_steps=len(SIGMAS) - 1)
    assert measured == pytest.approx(moments(exact), rel=1e-11)


def test_unequal_levels_of_cps_mix_predictions_as_denoise_does() -> None:
    levels = [mf.CPS(0.9), mf.CPS(0.4), mf.CPS(0.6)]
    x, z = drawn(*SHAPE), drawn(len(SIGMAS) - 1, *SHAPE)
    draws = iter(z)

    def velocity(data: Gaussian) -> Callable[[Tensor, Tensor], Tensor]:
        def v(x: Tensor, t: Tensor) -> Tensor:
            sigma = (t / 1000).to(x).expand(len(x))
            return (x - denoiser(data)(x, sigma)) / sigma.reshape(-1, 1, 1, 1)

        return v

    expected = mf.denoise(
        list(map(velocity, EXPERTS)), x, scheduler=SCHEDULER, num_steps=None, levels=levels,
        weights=WEIGHTS, noise=z,
    )  # fmt: skip
    found = sample(x, weights=WEIGHTS, levels=levels, noise_sampler=lambda *_: next(draws))
    assert (found - expected).abs().max() <= 1e-12


def test_one_hot_weights_are_that_flow_models_own_sampler() -> None:
    x = expected = drawn(*SHAPE)
    torch.manual_seed(3)
    for t, r in pairwise(SIGMAS.tolist()):
        v = (
            expected - denoiser(EXPERTS[1])(expected, torch.full((2,), t, dtype=torch.float64))
        ) / t
        a, b, tau = ancestral_rf(t, r, 0.7)
        expected = a * expected + b * v + (0.9 * tau * torch.randn_like(x) if r else 0.0)
    torch.manual_seed(3)
    found = sample(x, weights=[0.0, 1.0, 0.0], etas=[0.7] * 3, flow=True, s_noise=0.9)
    assert (found - expected).abs().max() <= 1e-12


def test_an_sde_draws_noise_for_its_last_step_unless_told() -> None:
    def asked(**options) -> int:
        calls: list[int] = []
        levels = [mf.FlowSDE(a, **options) for a in (0.7, 0.4, 0.5)]
        sampler = lambda *_: calls.append(1) or torch.zeros(SHAPE).double()  # noqa: E731
        sample(drawn(*SHAPE), levels=levels, noise_sampler=sampler)
        return len(calls)

    assert asked() == len(SIGMAS) - 1
    assert asked(last_step=False) == len(SIGMAS) - 2


VE = torch.tensor([14.6, 5.0, 1.5, 0.5, 0.1, 0.0], dtype=torch.float64)
CASES = [
    pytest.param(VE, {"etas": [1.0, 0.8, 0.5]}, id="Euler ancestral"),
    pytest.param(VE, {"etas": [0.0, 0.0, 0.0]}, id="without noise"),
    pytest.param(SIGMAS, {"etas": [1.0, 0.8, 0.5], "flow": True}, id="flow ancestral"),
    pytest.param(SIGMAS, {"levels": [mf.FlowSDE(a) for a in (0.7, 0.4, 1.2)]}, id="FlowSDE"),
    pytest.param(SIGMAS, {"levels": [mf.CPS(0.8)] * 3}, id="CPS"),
]


def simplex(*axes: int) -> Tensor:
    """Weights (B, M, *axes) on the simplex; the first half of the first axis is the first's."""
    w = torch.rand(axes[0], 3, *axes[1:], generator=torch.Generator().manual_seed(1)).double()
    w[0, :, :, : axes[-2] // 2] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1, 1)
    return w / w.sum(1, keepdim=True)


@pytest.mark.parametrize(("sigmas", "options"), CASES)
def test_each_pixel_is_fused_at_its_own_weights(sigmas: Tensor, options: dict) -> None:
    """Theorem 1 per element: these denoisers do not look at neighbours, so pixels are alone."""
    weights = simplex(2, 1, 5, 4)
    z, x = drawn(len(sigmas) - 1, *SHAPE), sigmas[0] * drawn(*SHAPE)

    def run(x: Tensor, weights: Tensor, z: Tensor) -> Tensor:
        draws = iter(z)
        return sample(x, sigmas, weights=weights, noise_sampler=lambda *_: next(draws), **options)

    found = run(x, weights, z)
    rows, pixels = weights.permute(0, 3, 4, 1, 2).reshape(-1, 3), len(sigmas) - 1
    alone = run(
        x.permute(0, 2, 3, 1).reshape(-1, 3), rows, z.permute(0, 1, 3, 4, 2).reshape(pixels, -1, 3)
    )
    expected = alone.reshape(2, 5, 4, 3).permute(0, 3, 1, 2)
    assert (found - expected).abs().max() <= 1e-12


def test_weights_alike_everywhere_are_weights() -> None:
    row = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]).double()
    options = {"etas": [1.0, 0.8, 0.5], "flow": True, "seeds": [5, 6]}
    x, seen = drawn(*SHAPE), {}
    expected = sample(
        x, weights=row, callback=lambda e: seen.update({e["i"]: e["denoised"]}), **options
    )
    previews: list[Tensor] = []
    found = sample(
        x,
        weights=row[..., None, None, None].expand(2, 3, 1, 5, 4),
        callback=lambda e: previews.append(e["denoised"]),
        **options,
    )
    assert (found - expected).abs().max() <= 1e-12
    assert all((seen[k] - preview).abs().max() <= 1e-12 for k, preview in enumerate(previews))


def test_a_pixel_without_weight_hides_whatever_is_there() -> None:
    weights = torch.zeros(2, 2, 1, 1, 4)
    weights[:, 0, ..., :2] = weights[:, 1, ..., 2:] = 1.0

    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        found = denoiser(EXPERTS[1])(x, sigma)
        found[..., :2] = math.nan
        return found

    options = {"flow": True, "etas": [1.0, 0.5], "weights": weights, "seeds": [1, 2]}
    models = [denoiser(EXPERTS[0]), broken]
    x = drawn(*SHAPE).float()
    found = sample_msdda(models, x, SIGMAS, disable=True, **options)
    whole = sample(x, experts=EXPERTS[:2], **options)
    assert found.isfinite().all() and torch.equal(found, whole)
    half = sample_msdda(models, x.half(), SIGMAS, disable=True, **options)
    assert half.dtype == torch.float16 and half.isfinite().all()


def test_a_denoiser_without_weight_anywhere_is_not_called() -> None:
    calls: list[int] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(1)
        return x

    pixels = torch.zeros(2, 2, 1, 5, 4)
    pixels[:, 0] = 1.0
    sample_msdda(
        [denoiser(EXPERTS[0]), counted], drawn(*SHAPE), SIGMAS, flow=True, etas=[1.0, 0.5],
        weights=lambda k: pixels if k < 5 else [0.5, 0.5], disable=True,
    )  # fmt: skip
    assert len(calls) == len(SIGMAS) - 1 - 5


@pytest.mark.parametrize("per_pixel", [False, True])
def test_ranges_of_sigma_are_a_callable_of_the_step(per_pixel: bool) -> None:
    early, late = [0.1, 0.2, 0.7], simplex(2, 1, 5, 4) if per_pixel else [0.5, 0.5, 0.0]
    options = {"etas": [1.0, 0.8, 0.5], "flow": True, "seeds": [1, 2]}
    x, sigmas = drawn(*SHAPE), SIGMAS.tolist()
    ranges = {(0.6, 1.0): early, (0.0, 0.6): late}
    assert {sigma >= 0.6 for sigma in sigmas[:-1]} == {True, False}
    found = sample(x, weights=ranges, **options)
    expected = sample(x, weights=lambda k: early if sigmas[k] >= 0.6 else late, **options)
    assert torch.equal(found, expected)


PIXELS = torch.full((2, 3, 1, 5, 4), 1 / 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sigmas": VE}, mf.InvalidSchedule, r"flow model: sigmas must decrease within \[0, 1\]"),
        ({"sigmas": SIGMAS[[0, 0, 8]]}, mf.InvalidSchedule, "must decrease"),
        ({"sigmas": SIGMAS[None]}, mf.InvalidShape, r"\(T \+ 1,\)"),
        ({"s_noise": -1.0}, mf.InvalidSchedule, "s_noise"),
        ({"etas": [1.0, 1.0, 1.5]}, mf.InvalidSchedule, r"eta must lie in \[0, 1\], got 1.5"),
        ({"etas": None}, ValueError, "one of the two"),
        ({"levels": [0.5] * 3}, ValueError, "one of the two"),
        ({"etas": None, "levels": [mf.FlowSDE(0.7)] * 2}, mf.InvalidShape, "levels have shape"),
        ({"weights": {(0.6, 1.0): [1, 0, 0]}}, mf.InvalidWeights, "is in none of 0.6-1"),
        (
            {"weights": {(0.6, 1.0): [1, 0, 0], (0.0, 0.7): [0, 1, 0]}},
            mf.InvalidWeights,
            "overlap: 0-0.7 and 0.6-1",
        ),
        ({"weights": {(1.0, 0.6): [1, 0, 0]}}, mf.InvalidWeights, "need keys"),
        ({"weights": {"a": 1.0}}, mf.InvalidWeights, "need named objectives"),
        ({"weights": 2 * PIXELS}, mf.InvalidWeights, r"at index \[0, 0, 0, 0\] .* sum to 2"),
        ({"weights": 1.5 * PIXELS[:, :2]}, mf.InvalidShape, "M = 3"),
        ({"weights": PIXELS[..., :2]}, mf.InvalidShape, "each axis of S as there or 1"),
        ({"weights": PIXELS[..., 0]}, mf.InvalidShape, r"expected \(B, M, \*S\) for x"),
        (
            {"weights": PIXELS, "levels": [mf.CPS(0.8), mf.CPS(0.4), mf.CPS(0.8)], "etas": None},
            mf.InvalidSchedule,
            "levels",
        ),
        ({"weights": PIXELS, "etas": [1.0, 0.0, 1.0]}, mf.ZeroVariance, "mix zero and positive"),
    ],
)
def test_bad_input_is_named(changes: dict, error: type[Exception], message: str) -> None:
    options = {"sigmas": SIGMAS, "etas": [1.0, 0.8, 0.5], "flow": True} | changes
    models = [lambda *_: pytest.fail("asked")] * 3
    with pytest.raises(error, match=message):
        sample_msdda(models, drawn(*SHAPE), disable=True, **options)

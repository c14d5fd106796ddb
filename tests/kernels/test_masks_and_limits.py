# SPDX-License-Identifier: Apache-2.0
"""Inactive objectives leave no trace, and zero variance means what its policy says."""

import math

import pytest
import torch
from torch import Tensor

from msdda_fast.errors import InvalidWeights, ZeroVariance
from msdda_fast.kernels import registry
from msdda_fast.kernels.fused_step import fast_fuse_step, fused_ddim_step
from msdda_fast.steps.coefficients import StepCoefficients
from tests.kernels.cases import ddim_case, moments_case

SHAPE = (2, 4, 3, 5)
NOISE = torch.zeros(SHAPE)


def means_of(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1, 1).expand(-1, *SHAPE).contiguous()


def fused_value(values: tuple[float, ...], backend: str, **options: object) -> float:
    """The one number that constant means fuse to."""
    result = fast_fuse_step(means_of(*values), noise=NOISE, backend=backend, **options)
    assert (result == result.flatten()[0]).all()
    return float(result.flatten()[0])


@pytest.mark.sweep
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("axes", [1, 2, 5])
def test_a_zero_weight_masks_its_objective_for_that_sample(axes, poison, backend):
    case = moments_case(3, SHAPE, torch.float32, axes, max(axes, 2))
    weights = case.weights.clone()
    weights[0, 1] = 0
    weights /= weights.sum(0, keepdim=True)
    z = {"noise": case.noise, "backend": backend}
    clean = fast_fuse_step(case.means, case.variances, weights, **z)
    means, variances = case.means.clone(), case.variances.clone()
    means[0, 1] = poison
    if axes > 1:
        variances[0, 1] = poison
    assert torch.equal(fast_fuse_step(means, variances, weights, **z), clean)
    assert clean.isfinite().all()


@pytest.mark.sweep
@pytest.mark.parametrize("clip_range", [None, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_zero_coefficient_masks_its_input(poison, clip_range, backend):
    case = ddim_case(2, SHAPE, torch.float32)
    width = 6 if clip_range is None else 13
    row = torch.randn(2, width, generator=torch.Generator().manual_seed(3))
    clean = fused_ddim_step(
        case.x_t,
        case.outputs,
        StepCoefficients(_without(row, 1, clip_range), 2, clip_range),
        noise=case.noise,
        backend=backend,
    )
    assert clean.isfinite().all()
    outputs, noise = case.outputs.clone(), case.noise.clone()
    outputs[1] = poison
    got = fused_ddim_step(
        case.x_t,
        outputs,
        StepCoefficients(_without(row, 1, clip_range), 2, clip_range),
        noise=noise,
        backend=backend,
    )
    assert torch.equal(got, clean)
    absent = fused_ddim_step(
        case.x_t,
        [case.outputs[0], None],
        StepCoefficients(_without(row, 1, clip_range), 2, clip_range),
        noise=noise,
        backend=backend,
    )
    assert torch.equal(absent, clean)


def _without(row: Tensor, m: int, clip_range: float | None) -> Tensor:
    """The row of two objectives with every coefficient of objective m set to 0."""
    row = row.clone()
    columns = [1 + m, 3 + m] if clip_range is None else [1 + m, 3 + m, 7 + m, 9 + m, 11 + m]
    row[:, columns] = 0
    return row


def test_a_zero_noise_scale_masks_the_noise(backend):
    case = ddim_case(1, SHAPE, torch.float32)
    step = StepCoefficients(torch.tensor([[1.0, 0.5, 0.5, 0.0]]), 1, None)
    noise = torch.full(SHAPE, math.nan)
    assert (
        fused_ddim_step(case.x_t, case.outputs, step, noise=noise, backend=backend).isfinite().all()
    )


def test_an_active_nan_does_propagate(backend):
    means = means_of(1.0, 2.0)
    means[1, 0, 0, 0, 0] = math.nan
    for variances in ([1.0, 2.0], torch.ones_like(means)):
        got = fast_fuse_step(means, variances, [0.5, 0.5], noise=NOISE, backend=backend)
        assert got.isnan().sum() == 1 and got[0, 0, 0, 0].isnan()


def test_steps_without_guidance_need_no_unconditional_half(backend):
    case = ddim_case(2, SHAPE, torch.float32)
    row = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    row[:, 1:3] = 0
    step = StepCoefficients(row, 2, None)
    both = fused_ddim_step(case.x_t, case.outputs, step, noise=case.noise, backend=backend)
    cond = fused_ddim_step(case.x_t, case.outputs[:, 1:], step, noise=case.noise, backend=backend)
    assert torch.equal(both, cond)


@pytest.mark.sweep
@pytest.mark.parametrize("pixelwise", [False, True], ids=["table", "pixelwise"])
@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e70])
def test_shares_do_not_overflow(scale, pixelwise, backend):
    variances = torch.tensor([1.0, 2.0], dtype=torch.float64) * scale
    if pixelwise:
        variances = variances.view(2, 1, 1, 1, 1).expand(2, *SHAPE)
    # precision is .5 + .25 in units of 1 / scale: shares 2/3 and 1/3
    got = fused_value((3.0, 6.0), backend, variances=variances, weights=[0.5, 0.5])
    assert got == pytest.approx(4.0, rel=2e-7)


ALL_ZERO, ONE_ZERO = [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]


@pytest.mark.sweep
@pytest.mark.parametrize("pixelwise", [False, True], ids=["table", "pixelwise"])
@pytest.mark.parametrize("variances", [ALL_ZERO, ONE_ZERO], ids=["all", "some"])
def test_zero_variances_need_a_policy(variances, pixelwise, backend):
    given = torch.tensor(variances)
    if pixelwise:
        given = given.view(3, 1, 1, 1, 1).expand(3, *SHAPE)
    options = {"variances": given, "weights": [0.2, 0.3, 0.5]}
    means = (1.0, 2.0, 100.0)
    with pytest.raises(ZeroVariance, match="dominate"):
        fused_value(means, backend, **options)
    # among those of zero variance by weight, or by w / c^2
    alone = (0.2 * 1 + 0.3 * 2, 0.5) if variances is ONE_ZERO else (0.2 + 0.6 + 50, 1.0)
    got = fused_value(means, backend, **options, zero_variance="dominate")
    assert got == pytest.approx(alone[0] / alone[1], rel=3e-7)
    w = [0.2 / 1, 0.3 / 4, 0.5 / 9 if variances is ALL_ZERO else 0.0]
    by_rate = sum(a * b for a, b in zip(w, means, strict=True)) / sum(w)
    got = fused_value(means, backend, **options, zero_variance="ratio", rates=[1, 2, 3])
    assert got == pytest.approx(by_rate, rel=3e-7)


def test_zero_variance_is_the_limit_of_small_variance(backend):
    limit = fused_value(
        (1.0, 2.0, 100.0),
        backend,
        variances=ONE_ZERO,
        weights=[0.2, 0.3, 0.5],
        zero_variance="dominate",
    )
    close = fused_value(
        (1.0, 2.0, 100.0), backend, variances=[1e-12, 1e-12, 1.0], weights=[0.2, 0.3, 0.5]
    )
    assert close == pytest.approx(limit, rel=1e-6)


def test_one_active_objective_needs_no_policy(backend):
    for variances in ([0.0, 1.0], [0.0, 0.0]):
        got = fused_value((3.0, math.nan), backend, variances=variances, weights=[1.0, 0.0])
        assert got == 3.0
    assert fused_value((3.0,), backend, variances=0.0, weights=[1.0]) == 3.0


def test_extrapolation_follows_eq_7_while_the_precision_is_positive(backend):
    options = {"weights": [1.5, -0.5], "extrapolate": True}
    # precision 1.5 / 1 - .5 / 2 = 1.25; mean (1.5 * 3 - .25 * 6) / 1.25 = 2.4
    assert fused_value((3.0, 6.0), backend, variances=[1.0, 2.0], **options) == pytest.approx(2.4)
    for variances in ([1.0, 0.25], torch.tensor([1.0, 0.25]).view(2, 1, 1, 1, 1).expand(2, *SHAPE)):
        with pytest.raises(InvalidWeights, match="no positive precision"):
            fused_value((3.0, 6.0), backend, variances=variances, **options)
    with pytest.raises(InvalidWeights, match=r"extrapolate=True"):
        fused_value((3.0, 6.0), backend, variances=[1.0, 2.0], weights=[1.5, -0.5])


def test_an_absent_output_has_no_clipped_prediction(backend):
    case = ddim_case(1, SHAPE, torch.float32)
    run = registry.resolve("fused_step", backend, "cpu").run
    row = torch.zeros(1, 8)
    row[0, [0, 4, 7]] = torch.tensor([1.0, 2.0, 3.0])  # x_scale, x0_x, x0_scale
    out = torch.empty(SHAPE)
    run(out, case.x_t, [None], row, clip_range=1.0)
    assert torch.equal(out, case.x_t)

# SPDX-License-Identifier: Apache-2.0
"""Each backend errs at most twice as much as the paper's chain of torch operations, plus one ulp.

Both are judged by `reference.py` in float64 on the same (rounded) inputs; the chain runs in float32
and rounds its result. For float64 data no wider judge exists, so there the two must agree within
the rounding of their terms. Triton, slow in its interpreter, has the bits of eager instead.
"""

import pytest
import torch

from msdda_fast.kernels.fused_step import fast_fuse_step, fused_ddim_step
from msdda_fast.levels import CPS, FlowSDE
from msdda_fast.steps.coefficients import StepCoefficients
from msdda_fast.steps.table import coefficient_table
from tests.kernels.cases import (
    ALPHA_BAR_PREV,
    ALPHA_BAR_T,
    DTYPES,
    GUIDANCE,
    SHAPES,
    DDIMCase,
    assert_accurate,
    ddim_case,
    literal_fusion,
    literal_step,
    moments_case,
    shape_id,
)
from tests.steps.flow_world import flow_scheduler

NARROW = tuple(dtype for dtype in DTYPES if dtype != torch.float64)


def coefficients(
    case: DDIMCase, dtype: torch.dtype, clip_range: float | None = None
) -> StepCoefficients:
    """The one step from ALPHA_BAR_T to ALPHA_BAR_PREV, through a two-entry schedule."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=2,
        steps_offset=0,
        set_alpha_to_one=False,
        clip_sample=clip_range is not None,
        clip_sample_range=clip_range or 1.0,
    )
    scheduler.alphas_cumprod = torch.tensor([ALPHA_BAR_PREV, ALPHA_BAR_T], dtype=torch.float64)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    table = coefficient_table(
        scheduler,
        2,
        etas=case.etas,
        weights=case.weights,
        guidance_scale=GUIDANCE,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    return table[0]


@pytest.mark.sweep
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_a_ddim_step_is_as_accurate_as_the_paper_s_chain(shape, dtype, count, quick_backend):
    case = ddim_case(count, shape, dtype)
    fast = fused_ddim_step(
        case.x_t, case.outputs, coefficients(case, dtype), noise=case.noise, backend=quick_backend
    )
    assert fast.dtype == dtype
    assert_accurate(fast, literal_step(case, torch.float32), literal_step(case, torch.float64))


@pytest.mark.sweep
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_clipped_ddim_step_is_too(dtype, count, quick_backend):
    case = ddim_case(count, (3, 5, 17, 7), dtype)
    clipped = coefficients(case, dtype, clip_range=1.0)
    assert clipped.clip_range == 1.0
    fast = fused_ddim_step(case.x_t, case.outputs, clipped, noise=case.noise, backend=quick_backend)
    assert_accurate(
        fast, literal_step(case, torch.float32, 1.0), literal_step(case, torch.float64, 1.0)
    )


@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_state_takes_half_outputs(output_dtype, quick_backend):
    case = ddim_case(2, (3, 5, 17, 7), output_dtype)
    case = case._replace(x_t=case.x_t.float() + 1e-4, noise=case.noise.float())
    fast = fused_ddim_step(
        case.x_t,
        case.outputs,
        coefficients(case, torch.float32),
        noise=case.noise,
        backend=quick_backend,
    )
    assert fast.dtype == torch.float32
    assert_accurate(fast, literal_step(case, torch.float32), literal_step(case, torch.float64))


@pytest.mark.parametrize("clip_range", [None, 1.0])
def test_a_float64_step_agrees_with_the_paper_s_chain(clip_range, quick_backend):
    case = ddim_case(3, (3, 5, 17, 7), torch.float64)
    step = coefficients(case, torch.float64, clip_range)
    fast = fused_ddim_step(case.x_t, case.outputs, step, noise=case.noise, backend=quick_backend)
    # two dozen roundings of terms that guidance makes as large as 2 g |eps| sqrt(1 / alpha_bar)
    bound = (
        24
        * torch.finfo(torch.float64).eps
        * 2
        * GUIDANCE
        * float(case.outputs.abs().max())
        / ALPHA_BAR_T**0.5
    )
    assert (fast - literal_step(case, torch.float64, clip_range)).abs().max() < bound


@pytest.mark.sweep
@pytest.mark.parametrize("axes", [(1, 1), (2, 1), (1, 2), (5, 1), (2, 5), (5, 5)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_fused_moments_are_as_accurate_as_eq_7(dtype, count, axes, quick_backend):
    case = moments_case(count, (3, 5, 17, 7), dtype, *axes)
    # tables of Python or float64 numbers are used as they are; pixelwise ones come in float32
    variances, weights = (t.float() if t.ndim > 2 else t for t in (case.variances, case.weights))
    case = case._replace(variances=variances.double(), weights=weights.double())
    fast = fast_fuse_step(case.means, variances, weights, noise=case.noise, backend=quick_backend)
    assert fast.dtype == dtype
    exact = case._replace(weights=case.weights / case.weights.sum(0, keepdim=True))
    assert_accurate(fast, literal_fusion(case, torch.float32), literal_fusion(exact, torch.float64))


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("axes", ["table", "pixelwise"])
def test_fused_moments_of_every_shape(shape, axes, quick_backend):
    case = moments_case(
        2, shape, torch.float32, *((2, 1) if axes == "table" else [1 + len(shape)] * 2)
    )
    case = case._replace(variances=case.variances.float(), weights=case.weights.float())
    fast = fast_fuse_step(
        case.means, case.variances, case.weights, noise=case.noise, backend=quick_backend
    )
    assert_accurate(fast, literal_fusion(case, torch.float32), literal_fusion(case, torch.float64))


@pytest.mark.parametrize("axes", [(1, 1), (2, 1), (5, 1), (5, 5)], ids=str)
def test_float64_moments_agree_with_eq_7(axes, quick_backend):
    case = moments_case(3, (3, 5, 17, 7), torch.float64, *axes)
    fast = fast_fuse_step(
        case.means, case.variances, case.weights, noise=case.noise, backend=quick_backend
    )
    bound = 24 * torch.finfo(torch.float64).eps * float(case.means.abs().max())
    assert (fast - literal_fusion(case, torch.float64)).abs().max() < bound


@pytest.mark.sweep(fast_backend=1)  # Triton's are in test_triton_cases.py
@pytest.mark.parametrize("count", [3, 16, 17], ids="M{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip_range", [None, 1.0])
def test_every_backend_is_bitwise_equal_to_eager(dtype, clip_range, count, fast_backend):
    case = ddim_case(count, (3, 5, 17, 7) if count == 3 else (3, 5, 3, 7), dtype)
    step = coefficients(case, dtype, clip_range)
    eager, fast = (
        fused_ddim_step(case.x_t, case.outputs, step, seeds=[1, 2, 3], backend=name)
        for name in ("eager", fast_backend)
    )
    assert torch.equal(eager, fast)


@pytest.mark.parametrize("kind", [FlowSDE, CPS], ids=lambda kind: kind.__name__)
def test_steps_of_flow_models_are_bitwise_equal_to_eager(kind, fast_backend):
    """Without guidance, x and noise in proportions that DDIM never has; the last step as well."""
    case = ddim_case(3, (3, 5, 3, 7), torch.float32)
    table = coefficient_table(
        flow_scheduler(3),
        None,
        levels=[kind(level) for level in (0.9, 0.4, 0.7)],
        weights=case.weights,
    )
    for k in (0, 2):
        eager, fast = (
            fused_ddim_step(
                case.x_t, case.outputs[:, :1], table[k], seeds=[1, 2, 3], step=k, backend=name
            )
            for name in ("eager", fast_backend)
        )
        assert torch.equal(eager, fast)


@pytest.mark.sweep(fast_backend=1)  # likewise
@pytest.mark.parametrize("axes", [(1, 1), (2, 5), (5, 2), (5, 5)], ids=str)
@pytest.mark.parametrize("count", [3, 17], ids="M{}".format)
def test_moments_are_bitwise_equal_to_eager(count, axes, fast_backend):
    shape = (3, 5, 17, 7) if count == 3 else (3, 5, 3, 7)
    case = moments_case(count, shape, torch.float32, *axes)
    variances, weights = (t if t.ndim < 3 else t.float() for t in (case.variances, case.weights))
    eager, fast = (
        fast_fuse_step(
            case.means, variances, weights, seeds=[1, 2, 3], backend=name, return_moments=True
        )
        for name in ("eager", fast_backend)
    )
    for one, other in zip(eager, fast, strict=True):
        assert torch.equal(one, other)

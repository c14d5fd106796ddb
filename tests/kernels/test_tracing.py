# SPDX-License-Identifier: Apache-2.0
"""Nothing reads a value on the way: the calls can be traced, captured and differentiated."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.kernels.fused_step import fast_fuse_step, fused_ddim_step
from msdda_fast.steps.coefficients import StepCoefficients

SHAPE = (2, 4, 6, 6)


def test_fake_tensors_pass_without_a_value_being_read():
    # reading one raises DataDependentOutputException; on a GPU it would be a device sync
    with FakeTensorMode():
        seeds = torch.zeros(2, dtype=torch.int64)
        step = torch.zeros((), dtype=torch.int64)
        means = torch.zeros(3, *SHAPE)
        for axes in (1, 2, 5):
            variances = torch.zeros((3, *SHAPE)[:axes])
            fused = fast_fuse_step(
                means, variances, variances, seeds=seeds, step=step, return_moments=True
            )
            assert fused.prev_sample.shape == SHAPE and fused.variance.shape == SHAPE[: axes - 1]
        outputs = torch.zeros(3, 2, *SHAPE)
        for width, clip_range in ((8, None), (18, 1.0)):
            row = torch.zeros(2, width)
            x = fused_ddim_step(
                means[0], outputs, StepCoefficients(row, 3, clip_range), seeds=seeds, step=step
            )
            assert x.shape == SHAPE
        assert counter_noise(seeds, SHAPE, step=step, backend="eager").shape == SHAPE


def test_tables_on_the_host_are_uploaded_for_means_elsewhere():
    means = torch.zeros(2, *SHAPE, device="meta")
    for weights in ([0.5, 0.5], torch.zeros(2, device="meta")):
        policy = {"zero_variance": "ratio", "rates": [1.0, 2.0]}
        fused = fast_fuse_step(means, [0.0, 2.0], weights, seeds=[1, 2], **policy)
        assert fused.device.type == "meta" and fused.shape == SHAPE


@pytest.mark.parametrize("axes", [1, 2, 4])
def test_eager_fusion_differentiates(axes):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 2)

    def positive(*size: int) -> torch.Tensor:
        values = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
        return values.requires_grad_()

    means, noise = positive(2, *shape), positive(*shape)
    variances, logits = positive(*(2, *shape)[:axes]), positive(*(2, *shape)[:axes])

    def fuse(*inputs: torch.Tensor) -> torch.Tensor:
        mu, var, free, z = inputs
        return fast_fuse_step(mu, var, free.softmax(0), noise=z, backend="eager")

    assert torch.autograd.gradcheck(fuse, (means, variances, logits, noise))


def test_a_masked_nan_leaves_clean_gradients():
    means = torch.ones(2, *SHAPE)
    means[1] = torch.nan
    means.requires_grad_()
    fast_fuse_step(
        means, 1.0, [1.0, 0.0], noise=torch.zeros(SHAPE), backend="eager"
    ).sum().backward()
    assert torch.equal(means.grad[0], torch.ones(SHAPE))
    assert torch.equal(means.grad[1], torch.zeros(SHAPE))


def test_eager_steps_differentiate():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(
        2, 2, 2, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True
    )
    noise = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    row = torch.randn(2, 13, generator=generator, dtype=torch.float64)

    def step(*inputs: torch.Tensor) -> torch.Tensor:
        coefficients = StepCoefficients(row, 2, 0.5)
        return fused_ddim_step(*inputs, coefficients, noise=noise, backend="eager")

    assert torch.autograd.gradcheck(step, (x, outputs))

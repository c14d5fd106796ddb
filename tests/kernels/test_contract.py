# SPDX-License-Identifier: Apache-2.0
"""What `fast_fuse_step` and `fused_ddim_step` return, where noise comes from, what they refuse."""

import pytest
import torch
from torch import Tensor

from msdda_fast.errors import BackendUnavailable, InvalidShape, InvalidWeights
from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.kernels.fused_step import FusedStep, fast_fuse_step, fused_ddim_step
from msdda_fast.steps.coefficients import StepCoefficients
from tests.kernels.cases import DTYPES, ddim_case

SHAPE = (2, 4, 3, 5)
MEANS = ddim_case(2, SHAPE, torch.float32).outputs[:, 0]
ROW = torch.tensor([[1.0, 0.25, -0.5, 0.5, 0.75, 0.3]])
STEP = StepCoefficients(ROW, 2, None)


def step(**options: object) -> Tensor:
    case = ddim_case(2, SHAPE, torch.float32)
    given = {"x_t": case.x_t, "outputs": case.outputs, "coefficients": STEP, "noise": case.noise}
    return fused_ddim_step(**(given | options))


def fuse(**options: object) -> Tensor | FusedStep:
    given = {"means": MEANS, "variances": [1.0, 2.0], "weights": [0.5, 0.5]}
    return fast_fuse_step(**(given | options))


@pytest.mark.parametrize("call", [fuse, step], ids=["fast_fuse_step", "fused_ddim_step"])
class TestNoise:
    def test_seeds_are_counter_noise_of_that_step(self, call, backend):
        z = counter_noise([5, -6], SHAPE, step=3, stream=1)
        seeded = call(noise=None, seeds=[5, -6], step=3, backend=backend)
        assert torch.equal(seeded, call(noise=z, backend=backend))
        tensors = {"seeds": torch.tensor([5, -6]), "step": torch.tensor(3)}
        assert torch.equal(seeded, call(noise=None, backend=backend, **tensors))

    def test_a_generator_draws_like_torch_randn(self, call, backend):
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))
        drawn = call(noise=None, generator=torch.Generator().manual_seed(8), backend=backend)
        assert torch.equal(drawn, call(noise=z, backend=backend))

    def test_a_list_of_generators_draws_sample_by_sample(self, call, backend):
        def generators() -> list[torch.Generator]:
            return [torch.Generator().manual_seed(s) for s in (8, 9)]

        z = torch.cat([torch.randn((1, *SHAPE[1:]), generator=g) for g in generators()])
        drawn = call(noise=None, generator=generators(), backend=backend)
        assert torch.equal(drawn, call(noise=z, backend=backend))

    def test_without_a_source_the_default_generator_draws(self, call, backend):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            drawn = call(noise=None, backend=backend)
            torch.manual_seed(4)
            assert torch.equal(drawn, call(noise=torch.randn(SHAPE), backend=backend))

    def test_two_sources_are_refused(self, call, backend):
        with pytest.raises(ValueError, match=r"at most one .* got noise and seeds"):
            call(noise=torch.zeros(SHAPE), seeds=[1, 2], backend=backend)

    @pytest.mark.parametrize(
        ("z", "message"),
        [
            (
                {"noise": torch.zeros(2, 4, 3)},
                r"noise has shape \(2, 4, 3\), expected \(2, 4, 3, 5\)",
            ),
            ({"noise": torch.zeros(SHAPE, dtype=torch.int64)}, "noise has dtype torch.int64"),
            ({"noise": None, "seeds": [1]}, r"seeds have shape \(1,\), expected \(2,\)"),
            ({"noise": None, "generator": [torch.Generator()]}, r"1 generators for 2 samples"),
        ],
    )
    def test_a_source_that_does_not_fit_is_refused(self, call, z, message):
        with pytest.raises(InvalidShape, match=message):
            call(**z)

    def test_out_of_another_shape_is_refused(self, call):
        with pytest.raises(InvalidShape, match=r"out has shape \(2, 4\), expected \(2, 4, 3, 5\)"):
            call(out=torch.zeros(2, 4))

    def test_gradients_are_for_eager_alone(self, call, native):
        z = torch.zeros(SHAPE, requires_grad=True)
        for name in ("auto", native):
            with pytest.raises(BackendUnavailable, match='backend="eager"'):
                call(noise=z, backend=name)
        assert call(noise=z, backend="eager").requires_grad
        with torch.no_grad():
            assert not call(noise=z, backend=native).requires_grad


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("variances", "weights", "expected"),
    [
        (1.5, [0.5, 0.5], ()),
        ([1.0, 2.0], [0.5, 0.5], ()),
        ([1.0, 2.0], [[0.5, 0.1], [0.5, 0.9]], (2,)),
        (torch.ones(2, 2), [0.5, 0.5], (2,)),
        (torch.ones(2, 1), [0.5, 0.5], (1,)),
        (torch.ones(2, *SHAPE), [0.5, 0.5], SHAPE),
        (torch.ones(2), torch.full((2, *SHAPE), 0.5), SHAPE),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_are_wide_and_the_variance_keeps_its_shape(
    dtype, variances, weights, expected, backend
):
    z = {"noise": torch.ones(SHAPE, dtype=dtype), "backend": backend}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = fast_fuse_step(MEANS.to(dtype), variances, weights, **z)
    fused = fast_fuse_step(MEANS.to(dtype), variances, weights, return_moments=True, **z)
    assert isinstance(fused, FusedStep)
    assert torch.equal(fused.prev_sample, drawn) and drawn.dtype == dtype
    assert fused.mean.dtype == wide and fused.mean.shape == SHAPE
    assert fused.variance.dtype == wide and fused.variance.shape == expected
    std = fused.variance.sqrt().reshape(*expected, *(1,) * (4 - len(expected)))
    ulp = torch.finfo(dtype).eps * 8  # |x| < 8
    assert (fused.mean + std - drawn.to(wide)).abs().max() <= ulp


def test_means_may_be_a_sequence(backend):
    z = {"seeds": [1, 2], "backend": backend}
    assert torch.equal(fuse(means=list(MEANS), **z), fuse(**z))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"means": []}, InvalidShape, "means are empty"),
        ({"means": [MEANS[0], MEANS[1, :1]]}, InvalidShape, r"means\[1\] has shape \(1, 4, 3, 5\)"),
        (
            {"means": [MEANS[0], MEANS[1].double()]},
            InvalidShape,
            "means.1. has dtype torch.float64",
        ),
        ({"means": MEANS.long()}, InvalidShape, "means has dtype torch.int64"),
        ({"means": torch.ones(())}, InvalidShape, r"means has shape \(\)"),
        ({"means": torch.ones(2)}, InvalidShape, r"\(M, B, \*S\)"),
        ({"variances": [1.0] * 3}, InvalidShape, r"\(3,\), expected \(2,\), \(2, 2\) or \(2, 2, 4"),
        ({"variances": torch.ones(2, 3)}, InvalidShape, r"variances has shape \(2, 3\)"),
        ({"variances": torch.ones(2, 2, 4)}, InvalidShape, r"variances has shape \(2, 2, 4\)"),
        ({"variances": [1.0, "a"]}, InvalidShape, "variances: expected numbers"),
        ({"variances": [1.0, -2.0]}, ValueError, "not negative, got -2.0"),
        ({"variances": [1.0, float("nan")]}, ValueError, "got nan"),
        ({"variances": [1.0, float("inf")]}, ValueError, "got inf"),
        ({"variances": torch.full((2, *SHAPE), -1.0)}, ValueError, "got -1.0"),
        ({"weights": [0.5, 0.6]}, InvalidWeights, "sum to 1.1"),
        ({"weights": [[0.5, 0.5], [0.5, 0.4]]}, InvalidWeights, "sum to 0.9"),
        ({"weights": torch.full((2, *SHAPE), 0.6)}, InvalidWeights, "sum to 1.2"),
        ({"weights": [0.5, float("nan")]}, InvalidWeights, "nan"),
        ({"weights": [0.5, 0.25, 0.25]}, InvalidShape, r"weights has shape \(3,\)"),
        ({"weights": torch.ones(2, 3)}, InvalidShape, r"weights has shape \(2, 3\)"),
        ({"zero_variance": "limit"}, ValueError, "'limit'"),
        ({"zero_variance": "ratio"}, ValueError, "rates"),
        ({"rates": [1.0, 2.0]}, ValueError, "rates"),
        ({"zero_variance": "ratio", "rates": [1.0]}, InvalidShape, r"\(1,\), expected .*\(2,\)"),
        ({"zero_variance": "ratio", "rates": [1.0, 0.0]}, ValueError, r"positive.*\[1.0, 0.0\]"),
        ({"step": -1}, ValueError, "got -1"),
        ({"backend": "cuda"}, BackendUnavailable, "'cuda'.*'auto', 'eager', 'native'"),
    ],
)
def test_fast_fuse_step_refuses_bad_input_by_name(options, error, message):
    with pytest.raises(error, match=message):
        fuse(**options)


OUTPUTS = ddim_case(2, SHAPE, torch.float32).outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x_t": torch.zeros(SHAPE, dtype=torch.int32)}, "x_t has dtype torch.int32"),
        ({"x_t": torch.zeros(SHAPE[:-1])}, r"outputs\[0\] has shape \(2, 2, 4, 3, 5\), expected"),
        ({"outputs": torch.ones(())}, r"outputs has shape \(\)"),
        ({"outputs": OUTPUTS[:1]}, "got 1 outputs .* expected 2"),
        ({"outputs": OUTPUTS[:, :, :1]}, r"\(2, 1, 4, 3, 5\), expected \(2, 2, 4, 3, 5\)"),
        ({"outputs": OUTPUTS.repeat(1, 2, 1, 1, 1, 1)}, r"\(4, 2, 4, 3, 5\), expected \(2, 2, 4"),
        ({"outputs": [OUTPUTS[0], OUTPUTS[1].half()]}, r"outputs\[1\] has dtype torch.float16"),
        ({"outputs": OUTPUTS.double()}, "float64, wider than x_t"),
        ({"outputs": [OUTPUTS[0], None]}, r"outputs\[1\] is None, but its coefficients are not 0"),
        ({"outputs": OUTPUTS[:, 1:]}, r"outputs\[0\] has no uncond half"),
        ({"coefficients": StepCoefficients(ROW[:, 1:], 2, None)}, r"\(1, 5\), expected \(2, 6\)"),
        ({"coefficients": StepCoefficients(ROW, 2, 1.0)}, r"\(1, 6\), expected \(2, 13\)"),
        ({"coefficients": StepCoefficients(ROW.expand(3, 6), 2, None)}, r"\(3, 6\), expected"),
        ({"x_t": torch.zeros(SHAPE, dtype=torch.float64)}, "dtype=torch.float64"),
    ],
)
def test_fused_ddim_step_refuses_bad_input_by_name(options, message):
    with pytest.raises(InvalidShape, match=message):
        step(**options)


@pytest.mark.parametrize("whole", [True, False], ids=["None", "K=1"])
@pytest.mark.parametrize("column", range(4, 13))
def test_an_absent_output_must_be_unused_in_the_clipped_layout_too(column, whole):
    # x_scale, uncond[2], cond[2], noise_scale, x0_x, x0_uncond[2], x0_cond[2], x0_scale[2]
    row = torch.zeros(1, 13)
    row[0, column] = 1.0
    outputs = [OUTPUTS[0], None if whole else OUTPUTS[1, 1:]]
    used = {4, 8, 10, 12} if whole else {8}
    clipped = StepCoefficients(row, 2, 1.0)
    if column in used:
        with pytest.raises(InvalidShape, match=r"outputs\[1\]"):
            step(outputs=outputs, coefficients=clipped)
    else:
        step(outputs=outputs, coefficients=clipped)

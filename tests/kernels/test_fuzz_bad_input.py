# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with a random request, the answer is a named error, and `out` stays as it was.

Each example is a valid request of random shape, broken in one place after the other.
"""

import math

import hypothesis.strategies as st
import pytest
import torch

from msdda_fast.errors import (
    BackendUnavailable,
    InvalidSchedule,
    InvalidShape,
    InvalidWeights,
    ZeroVariance,
)
from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.kernels.fused_step import fast_fuse_step, fused_ddim_step
from msdda_fast.steps.coefficients import StepCoefficients
from tests.kernels.drawing import DTYPES, Draw, fuzz, same_bits

extents = st.integers(1, 4)
shapes = st.lists(extents, min_size=2, max_size=5).map(tuple)
off_range = st.one_of(
    st.integers(max_value=-1), st.integers(min_value=2**32), st.sampled_from([1.5, True])
)
off_range_tensor = st.sampled_from([-1, 2**32]).map(torch.tensor)
not_float = st.sampled_from([torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8])
bad_number = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, -1e-30])


def other_shape(draw, shape):
    """A shape that is not `shape`: an axis more, less, or of another size."""
    axis, size = (
        draw.pick(st.integers(0, len(shape) - 1)),
        draw.pick(st.integers(30, 40)),
    )  # no other size
    ways = [(*shape, size), shape[:-1], (*shape[:axis], size, *shape[axis + 1 :]), ()]
    return draw.pick(st.sampled_from(ways))


def spoiled(draw, x, value):
    """`x` with `value` in one place."""
    x = x.clone()
    x.view(-1)[draw.pick(st.integers(0, x.numel() - 1))] = value
    return x


def break_noise(draw, shape):
    """Every wrong way to ask for noise: options and the error they must raise."""
    batch, z = shape[0], draw.normal(shape, torch.float32)
    seeds = list(range(batch))
    return [
        ({"noise": z.new_zeros(other_shape(draw, shape))}, InvalidShape),
        ({"noise": z.to(draw.pick(not_float))}, InvalidShape),
        ({"noise": z.to("meta")}, InvalidShape),
        ({"noise": z, "seeds": seeds}, ValueError),
        ({"noise": z, "generator": torch.Generator()}, ValueError),
        ({"seeds": seeds, "generator": torch.Generator()}, ValueError),
        ({"seeds": [*seeds, 1]}, InvalidShape),
        ({"seeds": torch.zeros(batch, 1, dtype=torch.int64)}, InvalidShape),
        ({"seeds": torch.zeros(batch, dtype=torch.int32)}, ValueError),
        ({"seeds": [2**64, *seeds[1:]]}, ValueError),
        ({"seeds": [-(2**63) - 1, *seeds[1:]]}, ValueError),
        ({"seeds": [0.5, *seeds[1:]]}, ValueError),
        ({"seeds": seeds, "step": draw.pick(off_range)}, ValueError),
        ({"seeds": seeds, "step": draw.pick(off_range_tensor)}, ValueError),
        ({"seeds": seeds, "step": torch.zeros(1, dtype=torch.int64)}, InvalidShape),
        ({"seeds": seeds, "step": torch.zeros(())}, InvalidShape),
        ({"generator": [torch.Generator() for _ in range(batch + 1)]}, InvalidShape),
    ]


def break_out(draw, shape):
    kind = draw.pick(st.sampled_from(["shape", "dtype", "shared", "grad"]))
    if kind == "shape":
        return torch.full(other_shape(draw, shape), 7.0), InvalidShape
    if kind == "shared":
        return torch.full((1,) * len(shape), 7.0).expand(2, *shape[1:]), InvalidShape
    if kind == "grad":
        return torch.full(shape, 7.0, requires_grad=True), ValueError
    return torch.full(shape, 7.0).to(draw.pick(not_float)), InvalidShape


def assert_refused(call, request, error):
    out, before = request["out"], request["out"].clone()
    with pytest.raises(error):
        call(**request)
    assert torch.equal(out, before) if not out.is_floating_point() else same_bits(out, before)


@pytest.mark.sweep(backend=1)  # refused before a backend is chosen
def test_a_broken_fusion_is_refused_by_name_and_writes_nothing(backend):
    def check(data):
        draw = Draw(data)
        shape, count = draw.pick(shapes), draw.pick(st.integers(2, 4))
        full = (count, *shape)
        raw, var = (draw.normal(full[: draw.pick(extents) % 2 + 1]).exp() for _ in range(2))
        means = draw.normal(full, torch.float32)
        good = {"means": means, "variances": var, "weights": raw / raw.sum(0), "backend": backend}
        good |= {"noise": draw.normal(shape, torch.float32)}
        out, w = torch.full(shape, 7.0), good["weights"]
        fast_fuse_step(**good, out=out.clone())

        noises = [({"noise": None} | ask, error) for ask, error in break_noise(draw, shape)]
        wrong_out, out_error = break_out(draw, shape)
        broken = [
            *noises,
            ({"out": wrong_out}, out_error),
            ({"means": means.to(draw.pick(not_float))}, InvalidShape),
            ({"means": [*means[1:], means[0].double()]}, InvalidShape),
            ({"means": [*means[1:], means.new_zeros(other_shape(draw, shape))]}, InvalidShape),
            ({"means": []}, InvalidShape),
            ({"variances": var.new_ones((*other_shape(draw, full)[:5], 6, 6, 6))}, InvalidShape),
            ({"variances": spoiled(draw, var, draw.pick(bad_number))}, ValueError),
            ({"variances": spoiled(draw, var, 0.0)}, ZeroVariance),
            ({"variances": var.to(torch.complex64)}, InvalidShape),
            ({"variances": ["a"] * count}, InvalidShape),
            ({"weights": spoiled(draw, w, draw.pick(bad_number))}, InvalidWeights),
            ({"weights": w * draw.pick(st.sampled_from([0.0, 0.99, 1.01, -1.0]))}, InvalidWeights),
            ({"weights": [1 / (count + 1)] * (count + 1)}, InvalidShape),
            ({"weights": [[0.5, 0.5], [0.5]]}, InvalidShape),
            ({"zero_variance": draw.pick(st.text())}, ValueError),
            ({"zero_variance": "ratio"}, ValueError),
            ({"zero_variance": "ratio", "rates": [1.0] * (count + 1)}, InvalidShape),
            ({"rates": [1.0] * count}, ValueError),
            ({"backend": "none"}, BackendUnavailable),
        ]
        for options, error in broken:
            assert_refused(fast_fuse_step, good | {"out": out} | options, error)

    fuzz(backend, st.data(), check)


@pytest.mark.sweep(backend=1)  # likewise
def test_a_broken_step_is_refused_by_name_and_writes_nothing(backend):
    def check(data):
        draw = Draw(data)
        shape, count = draw.pick(shapes), draw.pick(st.integers(1, 4))
        clip_range = draw.pick(st.sampled_from([None, 0.5]))
        width = 2 * count + 2 if clip_range is None else 5 * count + 3
        row = draw.normal((draw.pick(st.sampled_from([1, shape[0]])), width)).float().exp()
        x, outputs = draw.normal(shape, torch.float32), draw.normal((count, 2, *shape)).float()
        good = {"x_t": x, "outputs": outputs, "noise": x.clone(), "backend": backend}
        good |= {"coefficients": StepCoefficients(row, count, clip_range)}
        out = torch.full(shape, 7.0)
        fused_ddim_step(**good, out=out.clone())

        def table(values, number=count):
            return {"coefficients": StepCoefficients(values, number, clip_range)}

        def clipped(clip_range):
            wide = row.new_ones(1, 5 * count + 3)
            return {"coefficients": StepCoefficients(wide, count, clip_range)}

        noises = [({"noise": None} | ask, error) for ask, error in break_noise(draw, shape)]
        wrong_out, out_error = break_out(draw, shape)
        at = draw.pick(st.integers(0, count - 1))
        others, wrong = list(outputs), outputs.new_zeros(other_shape(draw, (2, *shape)))
        wrong_rows = row.new_zeros(other_shape(draw, tuple(row.shape)))
        broken = [
            *noises,
            ({"out": wrong_out}, out_error),
            ({"x_t": x.to(draw.pick(not_float))}, InvalidShape),
            ({"x_t": x.new_zeros(other_shape(draw, shape))}, InvalidShape),
            ({"x_t": x.double()}, InvalidShape),
            ({"x_t": x.to_sparse()}, InvalidShape),
            ({"outputs": outputs.to(draw.pick(not_float))}, InvalidShape),
            ({"outputs": outputs.double()}, InvalidShape),
            ({"outputs": outputs[0, 0, 0, 0]}, InvalidShape),
            ({"outputs": [*others, others[0]]}, InvalidShape),
            ({"outputs": [*others[:at], wrong, *others[at + 1 :]]}, InvalidShape),
            ({"outputs": [*others[:at], None, *others[at + 1 :]]}, InvalidShape),
            ({"outputs": [*others[:at], others[at][1:], *others[at + 1 :]]}, InvalidShape),
            (table(wrong_rows), InvalidShape),
            (table(row, count + 1), InvalidShape),
            (clipped(draw.pick(bad_number)), InvalidSchedule),
            (table(row.to(draw.pick(not_float))), InvalidShape),
            ({"backend": "none"}, BackendUnavailable),
        ]
        for options, error in broken:
            assert_refused(fused_ddim_step, good | {"out": out} | options, error)

    fuzz(backend, st.data(), check)


@pytest.mark.sweep(backend=1)  # likewise
def test_a_broken_request_for_noise_is_refused_by_name(backend):
    def check(data):
        draw = Draw(data)
        shape = draw.pick(shapes)
        good = {"seeds": list(range(shape[0])), "shape": shape, "backend": backend}
        counter_noise(**good)
        kinds = st.sampled_from([torch.int64, torch.bool, torch.complex64, None])
        broken = [
            ({"shape": shape[:1]}, InvalidShape),
            ({"shape": ()}, InvalidShape),
            ({"shape": (shape[0], -1)}, InvalidShape),
            ({"shape": (shape[0] + 1, *shape[1:])}, InvalidShape),
            ({"seeds": [2**64, *range(1, shape[0])]}, ValueError),
            ({"seeds": [True] * shape[0]}, ValueError),
            ({"seeds": torch.zeros(shape, dtype=torch.int64)}, InvalidShape),
            (
                {"seeds": torch.zeros(shape[0], dtype=draw.pick(st.sampled_from(DTYPES)))},
                ValueError,
            ),
            ({"step": draw.pick(off_range)}, ValueError),
            ({"stream": draw.pick(off_range)}, ValueError),
            ({"dtype": draw.pick(kinds)}, ValueError),
            ({"backend": "none"}, BackendUnavailable),
        ]
        for options, error in broken:
            with pytest.raises(error):
                counter_noise(**(good | options))

    fuzz(backend, st.data(), check)

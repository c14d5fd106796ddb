# SPDX-License-Identifier: Apache-2.0
"""Odd memory at the front doors of the step: read as torch reads it, or refused by name."""

import pytest
import torch
from torch.autograd import forward_ad

from msdda_fast.errors import BackendUnavailable, InvalidShape
from msdda_fast.kernels.fused_step import fast_fuse_step, fused_ddim_step
from msdda_fast.steps.coefficients import StepCoefficients
from tests.kernels.cases import ddim_case

SHAPE = (2, 4, 3, 5)
CASE = ddim_case(2, SHAPE, torch.float32)
ROW = torch.tensor([[1.0, 0.25, -0.5, 0.5, 0.75, 0.3]])


def fuse(**options):
    given = {
        "means": [CASE.outputs[0, 0], CASE.outputs[1, 0]],
        "variances": torch.full((2, *SHAPE), 0.5),
        "weights": torch.tensor([0.25, 0.75]),
        "noise": CASE.noise,
    }
    return fast_fuse_step(**(given | options))


def plain_fuse(**options):
    return fuse(**{"variances": [0.5, 0.5], **options})


def step(**options):
    given = {"x_t": CASE.x_t, "outputs": list(CASE.outputs), "noise": CASE.noise, "row": ROW}
    given |= options
    return fused_ddim_step(coefficients=StepCoefficients(given.pop("row"), 2, None), **given)


def negated(values):
    """The same values, as a view whose memory holds their negatives."""
    view = torch.view_as_complex(torch.stack([torch.zeros_like(values), -values], -1)).conj().imag
    assert view.is_neg() and view.equal(values)
    return view


def freed(values):
    values = values.clone()
    values.untyped_storage().resize_(0)
    return values


def shrunk(values):
    """A view into storage that ends before it does."""
    longer = torch.cat([values.reshape(-1)] * 2)
    view = longer[values.numel() :].view(values.shape)
    longer.untyped_storage().resize_(4 * (longer.numel() - 1))
    return view


PLACES = [
    (fuse, "means"),
    (fuse, "variances"),
    (fuse, "weights"),
    (fuse, "noise"),
    (plain_fuse, "means"),
    (step, "x_t"),
    (step, "outputs"),
    (step, "noise"),
    (step, "row"),
]
DEFAULTS = {
    "means": [CASE.outputs[0, 0], CASE.outputs[1, 0]],
    "variances": torch.full((2, *SHAPE), 0.5),
    "weights": torch.tensor([0.25, 0.75]),
    "noise": CASE.noise,
    "x_t": CASE.x_t,
    "outputs": list(CASE.outputs),
    "row": ROW,
}


def changed(name, change):
    """One argument changed; of several tensors the last."""
    value = DEFAULTS[name]
    return {name: [*value[:-1], change(value[-1])] if isinstance(value, list) else change(value)}


@pytest.mark.sweep
@pytest.mark.parametrize("call, name", PLACES, ids=lambda value: getattr(value, "__name__", value))
def test_a_negated_view_is_read_as_its_values(call, name, backend):
    expected = call(backend=backend)
    assert call(**changed(name, negated), backend=backend).equal(expected)


@pytest.mark.sweep
@pytest.mark.parametrize("change", [freed, shrunk], ids=lambda change: change.__name__)
@pytest.mark.sweep
@pytest.mark.parametrize("call, name", PLACES, ids=lambda value: getattr(value, "__name__", value))
def test_memory_that_is_gone_is_refused_by_name(call, name, change, backend):
    wanted = {"row": "coefficients", "means": r"means\[1\]", "outputs": r"outputs\[1\]"}
    with pytest.raises(InvalidShape, match=wanted.get(name, name) + r" has \d+ bytes.*freed"):
        call(**changed(name, change), backend=backend)


@pytest.mark.parametrize("call", [fuse, plain_fuse, step], ids=lambda call: call.__name__)
class TestOut:
    def test_refused(self, call, backend):
        overlapping = torch.zeros(200).as_strided(SHAPE, (60, 14, 5, 1))
        cases = {
            "negated view": negated(torch.zeros(SHAPE)),
            "its storage was freed": freed(torch.zeros(SHAPE)),
            "share their memory": overlapping,
            "strides .* share": torch.zeros(SHAPE[1:]).expand(SHAPE),
        }
        for message, out in cases.items():
            with pytest.raises(InvalidShape, match=message):
                call(out=out, backend=backend)
        assert overlapping.count_nonzero() == 0

    def test_any_slice_or_permutation_is_written(self, call, backend):
        expected = call(backend=backend)
        for out in (
            torch.zeros(4, 4, 3, 5)[::2],
            torch.zeros(5, 3, 4, 2).permute(3, 2, 1, 0),
            torch.zeros(2, 9, 3, 5)[:, 1::2],
            torch.zeros(SHAPE).to(memory_format=torch.channels_last),
        ):
            assert call(out=out, backend=backend) is out and out.equal(expected)

    @pytest.mark.parametrize("shift", [-7, 0, 1, 60], ids=str)
    def test_it_may_overlap_any_input(self, call, backend, shift):
        name = "x_t" if call is step else "noise"
        expected = call(backend=backend)
        memory = torch.zeros(400)
        taken = memory[100 : 100 + CASE.noise.numel()].view(SHAPE).copy_(DEFAULTS[name])
        out = memory[100 + shift : 100 + shift + taken.numel()].view(SHAPE)
        assert call(**{name: taken}, out=out, backend=backend) is out
        assert out.equal(expected)

    def test_it_may_overlap_an_input_with_other_strides(self, call, backend):
        name = "x_t" if call is step else "noise"
        memory = torch.zeros(2, 4, 5, 3)
        taken = memory.transpose(2, 3).copy_(DEFAULTS[name])
        out = memory.view(SHAPE)
        expected = call(backend=backend)
        assert call(**{name: taken}, out=out, backend=backend).equal(expected)

    def test_autograd_sees_the_write(self, call, backend):
        out = torch.ones(SHAPE)
        factor = torch.ones(SHAPE, requires_grad=True)
        product = factor * out  # saves `out` for its backward
        with torch.no_grad():
            call(out=out, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()

    def test_inference_tensors_are_written(self, call, backend):
        with torch.inference_mode():
            out = torch.zeros(SHAPE)
            assert call(out=out, backend=backend).equal(call(backend=backend))


def test_moments_go_to_an_overlapping_out(backend):
    for call in (fuse, plain_fuse):
        expected = call(return_moments=True, backend=backend)
        memory = torch.zeros(400)
        noise = memory[100:220].view(SHAPE).copy_(CASE.noise)
        out = memory[101:221].view(SHAPE)
        found = call(noise=noise, out=out, return_moments=True, backend=backend)
        assert found.prev_sample is out
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by forward_ad itself
class TestForwardMode:
    @pytest.mark.sweep
    @pytest.mark.parametrize("call, name", PLACES, ids=lambda v: getattr(v, "__name__", v))
    def test_tangents_are_refused_where_they_would_be_lost(self, call, name, fast_backend):
        with forward_ad.dual_level():
            call(backend=fast_backend)  # no tangent in sight
            dual = changed(name, lambda value: forward_ad.make_dual(value, torch.ones_like(value)))
            with pytest.raises(BackendUnavailable, match=r"forward-mode.*backend=.eager."):
                call(**dual, backend=fast_backend)

    def test_an_out_with_a_tangent_is_refused(self, fast_backend):
        with forward_ad.dual_level():
            out = forward_ad.make_dual(torch.zeros(SHAPE), torch.ones(SHAPE))
            with pytest.raises(BackendUnavailable, match="forward-mode"):
                step(out=out, backend=fast_backend)

    def test_transforms_are_refused_by_name(self, fast_backend):
        with pytest.raises(BackendUnavailable, match=r"torch\.func"):
            torch.func.jvp(lambda x: step(x_t=x, backend=fast_backend), (CASE.x_t,), (CASE.x_t,))
        with pytest.raises(BackendUnavailable, match=r"torch\.func"):
            torch.vmap(lambda x: step(x_t=x, backend=fast_backend))(CASE.x_t[None])

    def test_eager_follows_them(self):
        tangent = torch.randn(SHAPE, generator=torch.manual_seed(0))
        with forward_ad.dual_level():
            dual = step(x_t=forward_ad.make_dual(CASE.x_t, tangent), backend="eager")
            assert forward_ad.unpack_dual(dual).tangent.allclose(tangent)  # x_scale is 1
        value, moved = torch.func.jvp(
            lambda x: step(x_t=x, backend="eager"), (CASE.x_t,), (tangent,)
        )
        assert moved.allclose(tangent) and value.equal(step(backend="eager"))
        many = torch.vmap(lambda x: step(x_t=x, backend="eager"))(CASE.x_t[None])
        assert many[0].equal(value)

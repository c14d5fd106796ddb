# SPDX-License-Identifier: Apache-2.0
"""Rounding is to nearest even, and where a tensor lies in memory changes nothing."""

import pytest
import torch
from torch import Tensor

from msdda_fast.kernels import registry
from msdda_fast.kernels.fused_step import fast_fuse_step, fused_ddim_step
from msdda_fast.steps.coefficients import StepCoefficients
from tests.kernels.cases import DTYPES, ddim_case

SHAPE = (3, 5, 17, 7)


def step_of(count: int, batch: int = 3) -> StepCoefficients:
    generator = torch.Generator().manual_seed(count)
    return StepCoefficients(torch.randn(batch, 2 * count + 2, generator=generator), count, None)


def copied(x: Tensor, out: Tensor) -> Tensor:
    """x through the kernel and into `out`: 1 * x + nothing."""
    row = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    outputs = torch.zeros(1, 1, *x.shape, dtype=x.dtype)
    return fused_ddim_step(
        x, outputs, StepCoefficients(row, 1, None), noise=x, backend="native", out=out
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_is_read_exactly(dtype, native):
    del native
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, -1)
    wide = copied(halves, torch.empty(halves.shape))
    torch.testing.assert_close(wide, halves.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_floats_are_rounded_to_halves_as_torch_does(dtype, native):
    del native
    every_half = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    ties = (every_half[:-1] + every_half[1:]) / 2  # halfway between neighbours
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    wild = bits.to(torch.int32).view(torch.float32)
    x = torch.cat([every_half, ties, torch.nextafter(ties, every_half[1:]), wild]).view(1, -1)
    narrow = copied(x, torch.empty(x.shape, dtype=dtype))
    torch.testing.assert_close(narrow, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.sweep(backend=2)  # Triton's are in test_triton_cases.py
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_takes_any_float_dtype(dtype, out_dtype, backend):
    means = ddim_case(2, SHAPE, dtype).outputs[0]
    out = torch.empty(SHAPE, dtype=out_dtype)
    given = dict(variances=[0.5, 1.0], weights=[0.5, 0.5], seeds=[1, 2, 3], backend=backend)
    assert fast_fuse_step(means, **given, out=out) is out
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    wide = fast_fuse_step(means, **given, out=torch.empty(SHAPE, dtype=computed))
    assert torch.equal(out, wide.to(out_dtype))


def channels_last(x: Tensor) -> Tensor:
    flat = x.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    return flat.view(*x.shape) if x.ndim == 4 else flat.unflatten(0, x.shape[:-3])


def sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.sweep(backend=2)  # Triton's are in test_triton_cases.py
@pytest.mark.parametrize("seeded", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("layout", [channels_last, sliced, transposed], ids=lambda f: f.__name__)
def test_layouts_do_not_change_a_bit(layout, seeded, backend):
    case = ddim_case(2, SHAPE, torch.float32)
    step = step_of(2)
    z = {"seeds": [4, 5, 6]} if seeded else {"noise": case.noise}
    moved = {"seeds": [4, 5, 6]} if seeded else {"noise": layout(case.noise)}
    expected = fused_ddim_step(case.x_t, case.outputs, step, backend=backend, **z)
    assert not layout(case.x_t).is_contiguous()
    out = layout(torch.zeros(SHAPE))
    for target in (None, out):
        got = fused_ddim_step(
            layout(case.x_t), layout(case.outputs), step, backend=backend, out=target, **moved
        )
        assert torch.equal(got, expected)
    pixelwise = case.outputs[:, 0].exp()
    means, weights = case.outputs[:, 1], pixelwise.softmax(0)
    assert torch.equal(
        fast_fuse_step(means, pixelwise, weights, backend=backend, **z),
        fast_fuse_step(
            layout(means), layout(pixelwise), layout(weights), backend=backend, out=out, **moved
        ),
    )


def test_a_new_result_has_the_layout_of_the_state(backend):
    case = ddim_case(2, SHAPE, torch.float32)
    x_t = channels_last(case.x_t)
    got = fused_ddim_step(x_t, case.outputs, step_of(2), noise=case.noise, backend=backend)
    assert got.stride() == x_t.stride()


def test_a_step_in_place(backend):
    case = ddim_case(2, SHAPE, torch.float32)
    expected = fused_ddim_step(case.x_t, case.outputs, step_of(2), seeds=[1, 2, 3], backend=backend)
    x = case.x_t.clone()
    assert (
        fused_ddim_step(x, case.outputs, step_of(2), seeds=[1, 2, 3], backend=backend, out=x) is x
    )
    assert torch.equal(x, expected)


@pytest.mark.sweep(backend=2)  # Triton's are in test_triton_cases.py
def test_outputs_as_a_sequence_and_rows_for_the_whole_batch(backend):
    case = ddim_case(2, SHAPE, torch.float32)
    step = step_of(2, batch=1)
    spread = StepCoefficients(step.row.expand(3, -1), 2, None)
    together = fused_ddim_step(case.x_t, case.outputs, step, noise=case.noise, backend=backend)
    apart = fused_ddim_step(case.x_t, list(case.outputs), spread, noise=case.noise, backend=backend)
    assert torch.equal(together, apart)


@pytest.mark.sweep(backend=2)  # Triton's are in test_triton_cases.py
def test_the_raw_function_picks_row_and_noise_of_its_step(backend):
    case = ddim_case(2, SHAPE, torch.float32)
    rows = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(9))
    run = registry.resolve("fused_step", backend, "cpu").run
    seeds = torch.tensor([1, 2, 3])
    for k in (0, 3):
        expected = fused_ddim_step(
            case.x_t,
            case.outputs,
            StepCoefficients(rows[k], 2, None),
            seeds=seeds,
            step=k,
            backend=backend,
        )
        for step in (k, torch.tensor(k)):
            out = torch.empty(SHAPE)
            run(out, case.x_t, list(case.outputs), rows, step=step, seeds=seeds)
            assert torch.equal(out, expected)


@pytest.mark.sweep(backend=2)  # Triton's are in test_triton_cases.py
@pytest.mark.parametrize("step", [2, torch.tensor(2)], ids=["int", "tensor"])
def test_the_raw_function_takes_noise_of_every_step(step, backend):
    case = ddim_case(2, SHAPE, torch.float32)
    rows = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(10))
    run = registry.resolve("fused_step", backend, "cpu").run
    whole, entry = torch.empty(SHAPE), torch.empty(SHAPE)
    run(whole, case.x_t, list(case.outputs), rows, step=step, noise=noise)
    run(entry, case.x_t, list(case.outputs), rows[2], noise=noise[2])
    assert torch.equal(whole, entry)


@pytest.mark.sweep(backend=2)  # Triton's are in test_triton_cases.py
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [4, 5])
def test_the_raw_function_writes_the_next_network_input(channels, layout, dtype, backend):
    shape = (3, channels, 6, 7)
    case = ddim_case(2, shape, torch.float32)
    row = torch.randn(1, 6, generator=torch.Generator().manual_seed(9))
    run = registry.resolve("fused_step", backend, "cpu").run
    x, rows_of_network = torch.empty(shape), torch.empty(12, *shape[1:], dtype=dtype)
    rows_of_network = rows_of_network.to(memory_format=layout)
    next_input = rows_of_network.unflatten(0, (4, 3))
    run(x, case.x_t, list(case.outputs), row, noise=case.noise, next_input=next_input)
    assert torch.equal(rows_of_network, x.to(dtype).repeat(4, 1, 1, 1))


def test_threads_do_not_change_a_bit(native):
    shape = (2, 4, 160, 200)  # large enough to be shared out
    case = ddim_case(2, shape, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            for z in ({"noise": case.noise}, {"seeds": [1, 2]}):
                results.append(
                    fused_ddim_step(case.x_t, case.outputs, step_of(2, 2), backend=native, **z)
                )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
